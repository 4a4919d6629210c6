"""Load or recompute: the cheaper by measured rates, and loading where they are not known."""

from __future__ import annotations

import pytest

from kvswap.core.load_or_recompute import MARGIN, MIN_TOKENS, Rates, load_or_recompute

MEASURED = Rates(prefill_tokens=2000, prefill_us=2_000_000, load_tokens=1000, load_us=1_500_000)


@pytest.mark.parametrize(
    ("rates", "stored", "passes", "recompute"),
    [
        (None, 1000, 1, False),
        (Rates(), 1000, 1, False),
        (Rates(prefill_tokens=2000, prefill_us=1), 1000, 1, False),
        (Rates(load_tokens=2000, load_us=10**9), 1000, 1, False),
        (MEASURED, 0, 1, False),
        (MEASURED, 1000, 0, False),  # a decode step reads selected groups alone
        (MEASURED, 1000, 1, True),
        (MEASURED, 2000, 1, True),
        (MEASURED, 4000, 1, False),  # attention would cost more than was measured
        (MEASURED, 4000, 2, True),
    ],
)
def test_choice(rates, stored, passes, recompute) -> None:
    assert load_or_recompute(rates, stored, passes).recompute == recompute


def test_expected_times_are_given() -> None:
    found = load_or_recompute(MEASURED, 1000, 2)
    assert found.load_s == pytest.approx(3.0) and found.recompute_s == pytest.approx(1.0)
    assert load_or_recompute(MEASURED, 4000, 1).recompute_s == pytest.approx(8.0)


def test_recomputing_has_to_be_cheaper_by_a_margin() -> None:
    close = Rates(prefill_tokens=1000, prefill_us=1_000_000, load_tokens=1000, load_us=int(1e6 * MARGIN) - 1)
    assert not load_or_recompute(close, 1000, 1).recompute
    assert load_or_recompute(
        Rates(prefill_tokens=1000, prefill_us=1_000_000, load_tokens=1000, load_us=1_300_000), 500, 1
    ).recompute


def test_the_better_rates_are_kept_each_apart() -> None:
    slow_disk = Rates(prefill_tokens=4000, prefill_us=1_000_000, load_tokens=1000, load_us=9_000_000)
    assert MEASURED.better(slow_disk) == Rates(
        prefill_tokens=4000, prefill_us=1_000_000, load_tokens=1000, load_us=1_500_000
    )
    few = Rates(prefill_tokens=MIN_TOKENS - 1, prefill_us=1, load_tokens=MIN_TOKENS - 1, load_us=1)
    assert MEASURED.better(few) == MEASURED
    assert Rates().better(MEASURED) == MEASURED
