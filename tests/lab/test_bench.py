"""Arithmetic of benchmarks: cutting prompts, the disk's ceiling, growth of counters, the bound of a step."""

from __future__ import annotations

import dataclasses

import pytest

from kvswap.core.cache_stats import CacheStats
from kvswap.errors import InputError
from kvswap.lab.bench.interleaved import growth
from kvswap.lab.bench.run import ceiling_bytes_per_s, step_over_bound, stretch

TEST = {
    "small": {"read_bytes": 16384, "bytes_per_s": 100.0},
    "large": {"read_bytes": 65536, "bytes_per_s": 400.0},
}


@pytest.mark.parametrize(
    ("size", "expected"), [(4096, 25.0), (16384, 100.0), (40960, 250.0), (65536, 400.0), (1 << 20, 400.0)]
)
def test_ceiling_at_between_and_outside_the_tested_sizes(size: int, expected: float) -> None:
    assert ceiling_bytes_per_s(TEST, size) == pytest.approx(expected)


def test_stretches_follow_one_another_and_overlap_only_for_lack_of_text() -> None:
    ids = list(range(1000))
    place = {"context": 90, "batch": 2, "prompt": 1}
    assert [row[0] for row in stretch(ids, place, 90, 10, 2)] == [200, 300]
    assert all(len(row) == 100 for row in stretch(ids, place, 90, 10, 2))
    many = [stretch(ids[:250], {**place, "prompt": prompt}, 90, 10, 2) for prompt in range(2)]
    assert [row[0] for rows in many for row in rows] == [0, 50, 100, 150]
    assert stretch(ids[:100], {**place, "batch": 1, "prompt": 0}, 90, 10, 2) == [ids[:100]]
    with pytest.raises(InputError, match="101 tokens of text are needed, there are 100"):
        stretch(ids[:100], place, 90, 11, 2)


def test_growth_counts_the_reused_groups() -> None:
    before = CacheStats(selected_groups=100, reuse_rate=0.5, io_wait_s=1.0, disk_reads=7)
    after = dataclasses.replace(before, selected_groups=200, reuse_rate=0.75, io_wait_s=1.5, disk_reads=10)
    grown = growth(before, after)
    assert grown["reused_groups"] == pytest.approx(100)
    assert (grown["io_wait_s"], grown["disk_reads"], grown["decode_s"]) == (0.5, 3, 0)


@pytest.mark.parametrize(("waiting", "read_bytes", "expected"), [(0.0, 1, 1.0), (0.2, 1, 1.25), (0.5, 80, 1.25)])
def test_the_bound_is_the_longer_of_computing_and_reading(waiting: float, read_bytes: int, expected: float) -> None:
    row = {
        "batch": 2,
        "decode_tokens_per_s": 20.0,
        "read_bytes_per_token": read_bytes / 2,
        "ceiling_bytes_per_s": 1000.0,
        "exposed_wait_fraction": waiting,
    }
    assert step_over_bound(row) == pytest.approx(expected)
