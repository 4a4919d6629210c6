"""Law 4 through the whole engine, and that what happens to be in memory never changes an answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvswap.config import BACKENDS, Config
from kvswap.core.attach import attach
from kvswap.native import array_loops, loops
from tests.helpers.backends import make
from tests.helpers.families import FAMILIES, forced_logits, least_memory, tiny_model, tokens

PROMPT_TOKENS, STEPS = 700, 60
SLOTS_BYTES, WHOLE = 100_000, "16MiB"


def run(family: str, config: Config) -> tuple[torch.Tensor, float]:
    """Logits of a run that selects few of its groups, and the share of them that was in memory already."""
    model = tiny_model(family)
    if config.kv_memory == "auto":  # a few slots for reuse, so that there is something to read
        config = config.replace(kv_memory=least_memory(model, config, tokens(2, PROMPT_TOKENS)) + SLOTS_BYTES)
    with attach(model, config) as cache:
        result = forced_logits(model, tokens(2, PROMPT_TOKENS), tokens(2, STEPS, seed=1), cache)
        assert cache.stats.disk_reads > STEPS if config.kv_memory != WHOLE else cache.stats.disk_reads == 0
        return result, cache.stats.reuse_rate


def selecting(folder: Path, **changes: object) -> Config:
    return Config(**{"select_tokens": 120, "recent_tokens": 16, "kv_memory": "auto", "kv_dir": str(folder), **changes})


@pytest.mark.parametrize("name", [name for name in BACKENDS if name not in ("auto", "memory")])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_backends_give_the_same_logits(family: str, name: str, tmp_path: Path) -> None:
    make(name, tmp_path).close()  # skips where this machine cannot have it
    expected, reused = run(family, selecting(tmp_path, backend="memory"))
    assert reused < 0.9
    assert torch.equal(run(family, selecting(tmp_path, backend=name))[0], expected)


def test_residency_never_changes_the_result(tmp_path: Path) -> None:
    config = selecting(tmp_path)
    few, low = run("llama", config.replace(kv_memory=1_750_000))
    many, high = run("llama", config.replace(kv_memory=WHOLE))
    assert torch.equal(few, many)
    assert low < 0.9 and high == 1


def test_slots_without_a_compiler_give_the_same_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up, planning, keeping, gathering and putting have twins; scoring's rounds otherwise and stays."""

    def decode() -> tuple[torch.Tensor, int, float]:
        model = tiny_model("llama")
        with attach(model, selecting(tmp_path, kv_memory=1_750_000)) as cache:
            logits = forced_logits(model, tokens(2, PROMPT_TOKENS), tokens(2, 12, seed=1), cache)
            return logits, cache.stats.disk_reads, cache.stats.reuse_rate

    ours = decode()
    calls: list[str] = []
    monkeypatch.setattr(array_loops, "available", lambda: bool(calls.append("array")))
    monkeypatch.setattr(loops, "converts_here", lambda *_: bool(calls.append("convert")))
    twin = decode()
    assert torch.equal(ours[0], twin[0]) and ours[1:] == twin[1:] and ours[2] > 0
    assert {"array", "convert"} == set(calls)


def test_gaps_that_are_read_through_change_reads_and_nothing_else(tmp_path: Path) -> None:
    seen = []
    for gap_bytes in (0, 2048, 1 << 20):
        model = tiny_model("llama")
        with attach(model, selecting(tmp_path, kv_memory=1_750_000, read_gap_bytes=gap_bytes)) as cache:
            logits = forced_logits(model, tokens(2, PROMPT_TOKENS), tokens(2, 12, seed=1), cache)
            seen.append((logits, cache.stats.disk_reads, cache.stats.disk_read_bytes))
    (first, *_), (second, *_), (third, *_) = seen
    assert torch.equal(first, second) and torch.equal(first, third)
    reads, read_bytes = [each[1] for each in seen], [each[2] for each in seen]
    assert reads[0] > reads[1] > reads[2] and read_bytes[0] < read_bytes[1] < read_bytes[2]


def test_selection_matters_here(tmp_path: Path) -> None:
    """Otherwise the tests above would hold without any selection."""
    config = selecting(tmp_path)
    some, _ = run("llama", config)
    everything, _ = run("llama", config.replace(select_tokens=2000))
    assert not torch.allclose(some, everything, atol=1e-4)
