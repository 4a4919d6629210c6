from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvswap.errors import MemoryBudgetError
from kvswap.memory.ledger import Ledger

MIB = 1 << 20


def test_past_the_limit_nothing_is_taken() -> None:
    ledger = Ledger(limit_bytes=10 * MIB)
    ledger.reserve("sketch", 6 * MIB)
    with pytest.raises(MemoryBudgetError, match=r"slots needs 5\.0 MiB more, 4\.0 MiB of 10\.0 MiB are left") as caught:
        ledger.reserve("slots", 5 * MIB)
    assert caught.value.minimum_bytes == 11 * MIB
    assert "11.0 MiB" in caught.value.hint
    assert (ledger.reserved_bytes, ledger.free_bytes, ledger.peak_bytes) == (6 * MIB, 4 * MIB, 6 * MIB)
    assert "slots" not in ledger.reserved
    ledger.reserve("slots", 4 * MIB)
    assert ledger.free_bytes == 0


def test_giving_back_more_than_is_held_is_our_bug() -> None:
    ledger = Ledger(limit_bytes=100)
    ledger.reserve("tails", 10)
    for part, count in (("tails", 11), ("slots", 1)):
        with pytest.raises(ValueError, match=f"{part}: {count} bytes given back of "):
            ledger.release(part, count)
    assert ledger.reserved_bytes == 10


@given(st.integers(0, 100), st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60), st.booleans()), max_size=30))
def test_books_against_a_plain_account(limit: int, steps: list[tuple[str, int, bool]]) -> None:
    ledger, held, peak = Ledger(limit_bytes=limit), dict.fromkeys("abc", 0), 0
    parts_peak = dict.fromkeys("abc", 0)
    for part, count, take in steps:
        if take and sum(held.values()) + count > limit:
            with pytest.raises(MemoryBudgetError):
                ledger.reserve(part, count)
        elif take:
            ledger.reserve(part, count)
            held[part] += count
        elif 0 < count <= held[part]:
            ledger.release(part, count)
            held[part] -= count
        peak, parts_peak[part] = max(peak, sum(held.values())), max(parts_peak[part], held[part])
        assert ledger.reserved_bytes == sum(held.values()) <= limit
        assert ledger.free_bytes == limit - ledger.reserved_bytes
    assert ledger.peak_bytes == peak
    assert {part: ledger.peaks.get(part, 0) for part in "abc"} == parts_peak
