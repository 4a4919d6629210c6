"""Law 3 beside the kernel: what is stated is what anonymous memory grows by, in prefill and in decode.

In a process of its own: the allocator is set to give memory back, and nothing else takes any.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs mallopt and /proc/self/status")

MIB = 1 << 20
SCRIPT = """
import json, sys, torch
from kvswap import Config
from kvswap.core import calibration
from benchmarks.memory import measure
from tests.helpers.families import VOCABULARY, tiny_model, tokens
from tests.helpers.folders import byte_tokenizer

folder, cases = sys.argv[1], json.loads(sys.argv[2])
torch.set_num_threads(1)
calibration.CALIBRATION_TOKENS = calibration.SEQUENCE_TOKENS = 1024  # of what it takes only the bases last
wide = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "vocab_size": 300}
models = {"llama": tiny_model("llama", **wide), "gemma3": tiny_model("gemma3", **wide)}
ids = tokens(1, 6000)[0].tolist()
found = []
for family, tokens, append, implementation in cases:
    model = models[family]
    model.set_attn_implementation(implementation)
    config = Config(kv_dir=folder, kv_memory="8MiB")
    found.append(measure(model, ids[:tokens], 12, byte_tokenizer(), config, append))
print(json.dumps(found))
"""
CASES = {
    "one prompt": ("llama", 4000, 0, "sdpa"),
    "appended": ("llama", 4000, 1200, "sdpa"),
    "attention weights": ("llama", 2000, 0, "eager"),
    "sliding windows": ("gemma3", 3000, 0, "sdpa"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    folder, root = tmp_path_factory.mktemp("memory"), Path(__file__).parents[2]
    words = [sys.executable, "-c", SCRIPT, str(folder / "kv"), json.dumps(list(CASES.values()))]
    environment = {"XDG_CACHE_HOME": str(folder), "PYTHONPATH": f"{root / 'src'}:{root}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_prefill_takes_what_is_stated(case: str, found: dict[str, dict[str, int]]) -> None:
    result = found[case]
    grown, stated = result["prefill_growth_bytes"], result["prefill_peak_bytes"]
    assert abs(stated - grown) <= 0.1 * grown, result


@pytest.mark.parametrize("case", ["one prompt", "appended", "sliding windows"])
def test_decode_takes_what_the_ledger_holds_and_stays_under_the_limit(
    case: str, found: dict[str, dict[str, int]]
) -> None:
    result = found[case]
    assert result["kv_memory_peak_bytes"] <= result["kv_memory_limit_bytes"] == 8 * MIB
    held = result["kv_memory_peak_bytes"] + result["sliding_kv_bytes"]
    assert result["decode_held_bytes"] <= held + MIB // 2, result
    filled = result["prompt_parts_bytes"] + result["sliding_kv_bytes"]  # whether steps fill all slots is theirs to say
    assert result["decode_held_bytes"] >= 0.8 * filled, result
