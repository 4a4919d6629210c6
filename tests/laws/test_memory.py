"""Law 3: memory never exceeds the limit, and the account of it agrees with what is allocated."""

from __future__ import annotations

import pytest
import torch

from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.errors import MemoryBudgetError
from tests.helpers.families import FAMILIES, forced_logits, least_memory, tiny_model, tokens


def allocated_bytes(state) -> dict[str, int]:
    """What the parts of a state really hold."""
    pool = state.pool
    slot_bytes = state.layout.slot_bytes
    return {
        "sketch": sum(sketch.nbytes for sketch in state.sketches),
        "tables": pool.table.nbytes + pool.owner.nbytes + pool.worth.nbytes + pool.seen.nbytes,
        "slots": pool.reuse_slots * slot_bytes,
        "staging": 2 * pool.staging_groups * slot_bytes,
        "tails": pool.staging_start * slot_bytes,
        "write_queue": state.store.writer.nbytes,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_ledger_agrees_with_allocations_and_limit(family, tmp_path):
    model = tiny_model(family)
    with attach(model, Config(kv_memory="3MiB", kv_dir=str(tmp_path), select_tokens=100)) as cache:
        for turn in range(3):
            forced_logits(model, tokens(2, 600, seed=turn), tokens(2, 40, seed=9), cache)
            state = cache._state
            for part, count_bytes in allocated_bytes(state).items():
                assert count_bytes <= state.ledger.reserved[part], part
                assert count_bytes >= 0.8 * state.ledger.reserved[part] - 4096, part
            stats = cache.stats
            assert stats.kv_memory_peak_bytes <= stats.kv_memory_limit_bytes == 3 << 20


def test_growth_takes_slots_and_then_stops_with_an_error(tmp_path):
    model = tiny_model("llama")
    config = Config(kv_dir=str(tmp_path), select_tokens=100)
    limit = least_memory(model, config, tokens(1, 300))
    with attach(model, config.replace(kv_memory=limit)) as cache:
        forced_logits(model, tokens(1, 300), tokens(1, 2), cache)
        with pytest.raises(MemoryBudgetError, match="kv_memory"):
            for turn in range(20):
                forced_logits(model, tokens(1, 700, seed=turn), tokens(1, 2), cache)
        assert cache.stats.kv_memory_peak_bytes <= limit


def test_a_long_answer_takes_slots_and_then_the_last_of_its_headroom(tmp_path):
    """Three times what was planned for, under the smallest limit that can hold it: the same as with room for all."""
    model, prompt, answer = tiny_model("llama"), tokens(1, 40), tokens(1, 728, seed=1)
    config = Config(kv_dir=str(tmp_path), select_tokens=100, recent_tokens=16)
    with attach(model, config.replace(kv_memory="32MiB")) as cache:
        forced_logits(model, prompt, tokens(1, 1), cache)
        needs = cache._state.needs
    logits = []
    for limit in (sum(needs.parts(768).values()), "32MiB"):
        with attach(model, config.replace(kv_memory=limit)) as cache:
            logits.append(forced_logits(model, prompt, answer, cache))  # 768 tokens
            slots = cache.stats.reuse_slots
            assert cache.stats.kv_memory_peak_bytes <= cache.stats.kv_memory_limit_bytes
        assert slots == 0 or limit == "32MiB"
    assert torch.equal(logits[0], logits[1])


def test_too_small_a_limit_names_the_smallest_and_the_longest(tmp_path):
    model = tiny_model("llama")
    config = Config(kv_dir=str(tmp_path), select_tokens=100, kv_memory=1_400_000)
    with attach(model, config) as cache, pytest.raises(MemoryBudgetError) as caught:
        forced_logits(model, tokens(1, 6000), tokens(1, 1), cache)
    error = caught.value
    assert sum(error.parts.values()) == error.minimum_bytes
    assert f"{-(-error.minimum_bytes // 1024)}KiB (" in str(error)  # can be typed in as it is
    assert all(part.replace("_", " ") in str(error) for part, size in error.parts.items() if size)
    assert 0 < error.longest_tokens < 6000 and error.minimum_bytes > 1_400_000
    with attach(model, config.replace(kv_memory=error.minimum_bytes)) as cache:
        forced_logits(model, tokens(1, 6000), tokens(1, 1), cache)
    with attach(model, config) as cache:
        forced_logits(model, tokens(1, error.longest_tokens), tokens(1, 1), cache)


def test_a_prompt_that_is_refused_changes_no_account(tmp_path, monkeypatch):
    """For want of room under the limit, for its answer, or for want of free memory; the next prompt works."""
    model = tiny_model("llama")
    config = Config(kv_dir=str(tmp_path), select_tokens=100, recent_tokens=16, kv_memory="2MiB")
    with attach(model, config) as cache:
        forced_logits(model, tokens(1, 300), tokens(1, 2), cache)
        ledger = cache._state.ledger
        before = dict(ledger.reserved), dict(ledger.peaks), ledger.limit_bytes, cache.stats.reuse_slots
        with monkeypatch.context() as patch:
            patch.setattr("kvswap.core.prompt_memory.available_bytes", lambda: 1 << 10)
            with pytest.raises(MemoryBudgetError, match="of memory are free"):
                forced_logits(model, tokens(1, 600), tokens(1, 1), cache)
        with pytest.raises(MemoryBudgetError, match="is used up"):
            forced_logits(model, tokens(1, 30_000), tokens(1, 1), cache)
        cache.answer_tokens = 30_000
        with pytest.raises(MemoryBudgetError, match="an answer of up to 30,000"):
            forced_logits(model, tokens(1, 600), tokens(1, 1), cache)
        assert (dict(ledger.reserved), dict(ledger.peaks), ledger.limit_bytes, cache.stats.reuse_slots) == before
        assert forced_logits(model, tokens(1, 60), tokens(1, 2), cache).isfinite().all()
