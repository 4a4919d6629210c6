"""Where nothing was compiled, everything works by torch: a GGUF file runs as floats, which is said, and so does doctor.

In a process that cannot find the library, because every module that has asked for it remembers the answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from tests.helpers.families import tiny_model
from tests.helpers.packed import write_model

SCRIPT = """
import sys
sys.modules["kvswap.native._kernels"] = None  # as where it is missing
from kvswap.cli.main import run_command
from kvswap.native.library import available
from kvswap.tuning.checkup import check_up
assert not available()
check_up.__kwdefaults__ |= {"file_bytes": 1 << 20, "read_s": 0.05}
file, kv_dir, *targets = sys.argv[1:]
words = ["run", "--model", file, "--ask", "Who?", "--max-new-tokens", "8", "--kv-dir", kv_dir, "--stats-json"]
codes = [run_command([*words, targets[0]]), run_command([*words, targets[1], "--weights", "float"])]
codes.append(run_command(["doctor", "--kv-dir", kv_dir, "--json", targets[2]]))
sys.exit(max(codes))
"""


def test_a_gguf_file_runs_as_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where nothing was converted yet
    file = write_model(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=300), gguf.GGMLQuantizationType.Q8_0)
    targets = [tmp_path / name for name in ("auto.json", "float.json", "doctor.json")]
    words = [sys.executable, "-c", SCRIPT, *map(str, [file, tmp_path / "kv", *targets])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    packed, floats, found = (json.loads(target.read_text()) for target in targets)
    assert len(packed["token_ids"]) == 8 and packed["token_ids"] == floats["token_ids"]
    assert done.stdout.startswith(2 * (packed["text"] + "\n"))
    notices = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert len(notices) == 2 and "nothing was compiled here that multiplies packed weights" in notices[0]
    assert "converting tiny.gguf to a model directory, once" in notices[1]
    rows = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "compiled loops no (slower): the installation found no C compiler" in rows
    assert any(row.startswith("to do nothing was compiled, so models run slower") for row in rows)
    assert found["machine"]["compiled_loops"] is False
