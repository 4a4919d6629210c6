"""Faults of the disk under a running model: survived without a trace, or raised; never a wrong token, never a leak."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.disk import Faults
from kvswap.errors import DiskFullError, DiskReadError, StorageError, UnsupportedError
from tests.helpers.families import forced_logits, given, tiny_model, tokens

CONFIG = Config(select_tokens=120, recent_tokens=16, kv_memory="2MiB", backend="memory")


@pytest.fixture
def config(tmp_path: Path, groups_are_read: None) -> Config:
    return CONFIG.replace(kv_dir=str(tmp_path))


def logits_with(config: Config, faults: Faults, latency_s: float = 0.0) -> tuple[torch.Tensor, int]:
    """Logits of a run whose decode meets ``faults``, and the reads that were tried again."""
    model, ids, forced = tiny_model("llama"), tokens(1, 700), tokens(1, 30, seed=1)
    with attach(model, config) as cache:
        first = forced_logits(model, ids, forced[:, :0], cache)
        cache._backend.faults, cache._backend.latency_s = faults, latency_s
        rest = forced_logits(model, forced[:, :1], forced[:, 1:], cache)
        return torch.cat((first, rest)), cache._backend.counters.retries


@pytest.mark.parametrize("fault", ["fail_reads", "short_reads", "lost_reads"])
def test_passing_faults_change_nothing(fault: str, config: Config) -> None:
    expected, none = logits_with(config, Faults())
    result, retries = logits_with(config, Faults(**{fault: 3}), latency_s=0.001)
    assert torch.equal(result, expected)
    assert (none, retries) == (0, 3)


@pytest.mark.parametrize("faults", [{"fail_reads": 4}, {"lost_reads": 4}, {"fail_reads": 4, "read_errno": errno.ENXIO}])
def test_lasting_read_faults_are_raised_and_end_the_cache(faults: dict[str, int], config: Config) -> None:
    model, ids = tiny_model("llama"), tokens(1, 700)
    step = tokens(1, 1, seed=1)
    expected, _ = logits_with(config, Faults())
    with attach(model, config) as cache, torch.no_grad():
        forced_logits(model, ids, step[:, :0], cache)
        cache._backend.faults = Faults(**faults)
        with pytest.raises(DiskReadError, match="KV file"):
            model(step, **given(model, cache))
        with pytest.raises(UnsupportedError, match="broke off"):  # healthy again, but layers differ
            model(step, **given(model, cache))
    again, _ = logits_with(config, Faults())
    assert torch.equal(again, expected)


@pytest.mark.parametrize("write", [1, 3, 9])
def test_full_disk_in_the_middle_of_prefill(write: int, config: Config) -> None:
    model = tiny_model("llama")
    with attach(model, config.replace(kv_memory="4MiB")) as cache, torch.no_grad():
        cache._backend.faults.full_at_write = write
        with pytest.raises(DiskFullError, match="free some space"):
            for turn in range(8):
                model(tokens(1, 2000, seed=turn), **given(model, cache))
        with pytest.raises((UnsupportedError, DiskFullError)):
            model(tokens(1, 5), **given(model, cache))
    assert "forward" not in model.model.layers[0].__dict__


def test_full_disk_in_the_middle_of_decode(config: Config) -> None:
    model = tiny_model("llama")
    with attach(model, config) as cache:
        forced_logits(model, tokens(1, 700), tokens(1, 3, seed=1), cache)
        cache._backend.faults.full_at_write = 1
        with pytest.raises(DiskFullError):
            forced_logits(model, tokens(1, 1), tokens(1, 80, seed=1), cache)


def test_space_is_checked_before_anything_is_computed(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr("kvswap.disk.files.free_bytes", lambda path: 64 << 10)
    computed: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: computed.append(1))
    with (
        attach(model, config.replace(backend="auto")) as cache,
        torch.no_grad(),
        pytest.raises(StorageError, match=r"full disk: .* are needed; free some space"),
    ):
        model(tokens(1, 700), **given(model, cache))
    assert computed == []
    assert list(tmp_path.iterdir()) == []


def test_memory_is_checked_before_anything_is_computed(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr("kvswap.core.prompt_memory.available_bytes", lambda: 1 << 20)
    from kvswap.errors import MemoryBudgetError

    with attach(model, config) as cache, torch.no_grad():
        with pytest.raises(MemoryBudgetError, match=r"temporarily, 1\.0 MiB of memory are free"):
            model(tokens(1, 3000), **given(model, cache))
        monkeypatch.undo()
        assert model(tokens(1, 30), **given(model, cache)).logits.isfinite().all()


def test_interrupt_in_prefill_leaves_nothing(config: Config, tmp_path: Path) -> None:
    model, calls = tiny_model("llama"), []

    def interrupt(stage: str, done: int, total: int) -> None:
        calls.append(done)
        if done == 2:
            raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        attach(model, config.replace(backend="auto"), on_progress=interrupt) as cache,
        torch.no_grad(),
    ):
        model(tokens(1, 700), **given(model, cache))
    assert calls == [1, 2]
    assert list(tmp_path.iterdir()) == []
    assert "_kvswap_attachment" not in model.__dict__


CHILD = """
import os, signal, sys, torch
from kvswap.core.attach import attach
from kvswap.config import Config
from tests.helpers.families import given, tiny_model, tokens
model = tiny_model("llama")
def kill(stage, done, total):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
with attach(model, Config(kv_dir=sys.argv[1]), on_progress=kill) as cache, torch.no_grad():
    model(tokens(1, 700), **given(model, cache))
"""


def test_kill_in_prefill_leaves_no_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], cwd=Path(__file__).parents[2], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [name for _, _, names in os.walk(tmp_path) for name in names] == []
