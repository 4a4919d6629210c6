from __future__ import annotations

import itertools

import pytest

from kvswap import trace
from kvswap.trace import Trace


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
