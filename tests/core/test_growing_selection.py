"""M grows with the context: by its length and the limit alone, with what is in memory kept through every change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import kvswap
from kvswap.config import Config
from kvswap.core import attach as attaching
from kvswap.core.attach import AUTO_SHARE, SHARES, SLOW_SHARE, UNKNOWN_SHARE, select_share
from kvswap.disk import read_rate
from kvswap.disk.read_rate import reads_per_s
from kvswap.disk.slab import move_within
from kvswap.errors import DiskFullError
from tests.helpers.families import tiny_model, tokens
from tests.helpers.folders import byte_tokenizer

FAST = SHARES[0][0]


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch, cache_home: Path) -> None:
    monkeypatch.setattr(attaching, "reads_per_s", lambda *_: float(FAST))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", max_position_embeddings=16384, vocab_size=300)


def forced(model, cache, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([model(torch.tensor([[each]]), cache=cache).logits[0, -1] for each in ids])


def prompt(model, cache, ids: list[int]) -> None:
    with torch.no_grad():
        model(torch.tensor([ids]), cache=cache)


def test_share_of_the_context_between_a_floor_and_a_cap() -> None:
    config = Config()
    assert config.grows and not config.replace(select_tokens=400).grows
    assert not config.replace(layer_select_tokens=(400, 500)).grows
    found = [config.selected_tokens(each) for each in (100, 3200, 8192, 16384, 32768, 100_000)]
    assert found == [400, 533, 1365, 2730, 4096, 4096]


@pytest.mark.parametrize("compiled", ["auto", "off"])
@pytest.mark.parametrize("kv_memory", ["auto", "3MiB"])
def test_what_is_selected_follows_the_context_and_not_its_history(model, tmp_path, compiled, kv_memory) -> None:
    """A context that came in pieces, with steps between them, is answered as one that came at once."""
    ids = tokens(1, 7040)[0].tolist()
    settings = {"kv_memory": kv_memory, "kv_dir": str(tmp_path), "compiled_step": compiled, "store_dtype": "float32"}
    with kvswap.attach(model, Config(**settings), tokenizer=byte_tokenizer()) as cache:
        seen = []
        for start, stop in ((0, 1000), (1000, 4000), (4000, 7000)):
            prompt(model, cache, ids[start:stop])
            seen.append(cache.stats.select_tokens)
            forced(model, cache, ids[stop : stop + 3])
            cache.truncate(stop)
        pieces = forced(model, cache, ids[7000:])
        grown, ledger = cache.stats.select_tokens, cache._state.ledger
        assert ledger.reserved["staging"] == 2 * cache._state.pool.staging_groups * cache._state.layout.slot_bytes
        assert cache.stats.kv_memory_peak_bytes <= cache.stats.kv_memory_limit_bytes
    with kvswap.attach(model, Config(**settings), tokenizer=byte_tokenizer()) as cache:
        prompt(model, cache, ids[:7000])
        at_once = forced(model, cache, ids[7000:])
        assert cache.stats.select_tokens == grown
    assert seen[0] == 400 < seen[1] < seen[2] == grown
    differences = (pieces - at_once).abs().amax(1)  # sums of another order may decide a tie in another way
    assert int((differences < 1e-4).sum()) >= 36 and float(differences.max()) < 0.02


def test_reuse_slots_move_with_what_they_hold(model, tmp_path) -> None:
    ids = tokens(1, 5000)[0].tolist()
    with kvswap.attach(model, Config(kv_dir=str(tmp_path), kv_memory="3MiB"), tokenizer=byte_tokenizer()) as cache:
        prompt(model, cache, ids[:3300])
        forced(model, cache, ids[3300:3310])
        pool = cache._state.pool
        held = pool.table >= 0
        before = pool.rows(0)[torch.from_numpy(pool.table[held].astype(np.int64))].clone()
        assert held.any()
        for groups in (pool.staging_groups + 37, pool.staging_groups):
            drop = max(0, pool.missing_slots(groups))
            pool.shrink_reuse(pool.reuse_slots - drop)
            still = pool.table[held] >= 0
            pool.resize_staging(groups)
            places = torch.from_numpy(pool.table[held][still].astype(np.int64))
            assert bool(still.any()) and torch.equal(pool.rows(0)[places], before[torch.from_numpy(still)])
            assert pool.staging_groups == groups


def test_little_memory_bounds_what_is_selected(model, tmp_path) -> None:
    ids = tokens(1, 6000)[0].tolist()
    found = []
    for limit in ("auto", "1700KiB", "16MiB"):
        with kvswap.attach(model, Config(kv_dir=str(tmp_path), kv_memory=limit), tokenizer=byte_tokenizer()) as cache:
            prompt(model, cache, ids)
            forced(model, cache, ids[:2])
            found.append(cache.stats.select_tokens)
            assert cache.stats.kv_memory_peak_bytes <= cache.stats.kv_memory_limit_bytes
    assert 400 <= found[1] < found[2]


def test_slower_disks_bring_less(monkeypatch, tmp_path) -> None:
    class Backend:
        name, direct = "uring", True

    for rate, share in ((FAST, AUTO_SHARE), (FAST - 1, 2 * AUTO_SHARE), (8_000, SLOW_SHARE), (0, SLOW_SHARE)):
        monkeypatch.setattr(attaching, "reads_per_s", lambda *_, rate=rate: float(rate))
        assert select_share(Backend(), tmp_path) == share
    Backend.direct = False  # then the page cache answers, however slow the disk is
    assert select_share(Backend(), tmp_path) == UNKNOWN_SHARE


@pytest.mark.parametrize(("source", "target"), [(10, 13), (13, 10), (0, 40), (5, 5)])
def test_moves_within_one_memory_keep_what_they_move(source: int, target: int) -> None:
    memory = torch.arange(100)
    moved = memory[source : source + 50].clone()
    move_within(memory, source, target, 50, at_once=7)
    assert torch.equal(memory[target : target + 50], moved)


def test_a_disk_is_measured_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("KVSWAP_HOME", str(tmp_path))
    read_rate._kept.cache_clear()
    calls = []

    def measure(*which: object) -> float:
        calls.append(which)
        return 1234.0

    assert reads_per_s("threads", tmp_path, measure=measure) == 1234
    read_rate._kept.cache_clear()  # as another process
    assert reads_per_s("threads", tmp_path, measure=measure) == 1234 and len(calls) == 1
    (tmp_path / "disks.json").write_text("[1, 2")
    read_rate._kept.cache_clear()
    assert reads_per_s("threads", tmp_path, measure=measure) == 1234 and len(calls) == 2
    assert reads_per_s("threads", tmp_path / "missing", measure=measure) == 0


def test_a_disk_that_cannot_be_measured_counts_as_slow_until_it_can(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("KVSWAP_HOME", str(tmp_path / "home"))
    read_rate._kept.cache_clear()

    def full(*_: object) -> float:
        raise DiskFullError("no room")

    assert reads_per_s("threads", tmp_path, measure=full) == 0
    assert reads_per_s("threads", tmp_path, measure=lambda *_: 77.0) == 77
    (tmp_path / "home").rename(tmp_path / "gone")
    (tmp_path / "home").write_text("no folder")  # nothing can be kept, and the rate counts all the same
    read_rate._kept.cache_clear()
    assert reads_per_s("threads", tmp_path, measure=lambda *_: 99.0) == 99


@pytest.mark.parametrize("backend", ["auto", "threads", "buffered"])
def test_a_measured_rate_is_that_of_a_disk(backend, tmp_path) -> None:
    assert 100 < read_rate.measured(backend, tmp_path) < 1e8
    assert not any(tmp_path.iterdir())
