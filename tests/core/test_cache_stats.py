from __future__ import annotations

import itertools

import pytest

from kvswap.core import cache_stats as trace
from kvswap.core.cache_stats import Trace


def test_times_add_up_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 2.0)
    monkeypatch.setattr(trace.time, "perf_counter", lambda: next(clock))
    counters = Trace()
    with counters.timed("prefill_s"):
        pass
    with pytest.raises(KeyError), counters.timed("prefill_s"):
        raise KeyError
    assert counters.prefill_s == 4.0
    assert counters.calibration_s == 0.0


def test_laps_add_up_and_a_nameless_one_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 11.0, 15.0, 20.0, 22.0])
    monkeypatch.setattr(trace.time, "perf_counter", lambda: next(times))
    found = Trace()
    for name in ("", "predict_s", "slots_s", "", "predict_s"):
        found.lap(name)
    assert (found.predict_s, found.slots_s, found.submit_s) == (3.0, 4.0, 0.0)
