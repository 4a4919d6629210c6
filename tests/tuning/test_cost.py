"""The cost model: exact at measured points, interpolated between them, and right in each part of a step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvswap.tuning.cost import (
    BurstRate,
    DiskCosts,
    LinearCost,
    ModelCosts,
    PredictCost,
    Traffic,
    step_cost,
)

LATENCY_S, RATE, PER_READ_S = 100e-6, 500e6, 10e-6


def burst_s(depth: float, size: float) -> float:
    return LATENCY_S + depth * (PER_READ_S + size / RATE)


def disk(slower: float = 1.0) -> DiskCosts:
    points = [
        BurstRate(read_bytes=size, depth=depth, burst_s=slower * burst_s(depth, size))
        for size in (512, 4096, 32768, 262144)
        for depth in (1, 4, 16, 64)
    ]
    return DiskCosts(
        backend="uring",
        direct_io=True,
        alignment_bytes=512,
        write_bytes_per_s=1e9,
        collect_s=5e-6,
        latency_us={},
        bursts=points,
        paced=[],
    )


def model() -> ModelCosts:
    return ModelCosts(
        prefill_tokens_per_s=100.0,
        outside_s=0.01,
        query_s=50e-6,
        compute=LinearCost(base_s=1e-3, per={"attended": 1e-6}),
        slots=LinearCost(base_s=1e-4, per={"groups": 1e-6, "attended": 1e-7, "capacity": 1e-9}),
        submit=LinearCost(base_s=1e-5, per={"reads": 5e-6}),
        predict=[
            PredictCost(tokens=tokens, rank=rank, bits=bits, cost_s=tokens * rank * bits * 1e-10)
            for tokens in (1000, 4000)
            for rank in (16, 96)
            for bits in (2, 4)
        ],
    )


def traffic(groups: float, reads: float, layers: int = 3, read_bytes: float = 8192.0) -> Traffic:
    each = np.full(layers, reads)
    return Traffic(
        selected_groups=np.full(layers, groups), missed_groups=each, reads=each, read_bytes=each * read_bytes
    )


SETTING = {"tokens": 4000, "pinned_tokens": 70.0, "group_tokens": 4, "rank": 88, "bits": 4, "reuse_slots": 0}


def test_bursts_are_exact_where_they_were_measured() -> None:
    for point in disk().bursts:
        found = disk().burst_s(np.array([float(point.depth)]), np.array([float(point.read_bytes)]))
        assert found[0] == pytest.approx(point.burst_s, rel=1e-9)


@given(st.floats(1, 64), st.floats(512, 262144))
def test_bursts_between_the_points_are_near(depth: float, size: float) -> None:
    found = disk().burst_s(np.array([depth]), np.array([size]))[0]
    assert found == pytest.approx(burst_s(depth, size), rel=0.35)


def test_bursts_outside_the_points_grow_with_count_and_bytes() -> None:
    once, more, larger, none = disk().burst_s(
        np.array([64.0, 128.0, 64.0, 0.0]), np.array([262144.0] * 2 + [524288.0] * 2)
    )
    assert more == pytest.approx(2 * once) and larger == pytest.approx(2 * once) and none == 0


def test_the_efficient_read_size_is_the_smallest_near_the_best_rate() -> None:
    rates = dict(disk().peak_rates())
    chosen = disk().read_size_bytes()
    assert rates[chosen] >= 0.8 * max(rates.values())
    assert all(rate < 0.8 * max(rates.values()) for size, rate in rates.items() if size < chosen)


@pytest.mark.parametrize(("tokens", "rank", "bits"), [(1000, 16, 4), (4000, 96, 2), (2500, 56, 4), (8000, 96, 4)])
def test_prediction_is_interpolated_and_extrapolated(tokens: int, rank: int, bits: int) -> None:
    assert model().predict_s(tokens, rank, bits) == pytest.approx(50e-6 + tokens * rank * bits * 1e-10)


def test_hidden_reads_cost_only_their_collection_except_in_the_first_layer() -> None:
    found = step_cost(model(), disk(), traffic(80, 8), **SETTING)
    burst = burst_s(8, 8192)
    assert found.read_s == pytest.approx(3 * burst, rel=0.2)
    assert 2 * 5e-6 < found.wait_s < 2 * 5e-6 + burst
    assert found.compute_s == pytest.approx(0.01 + 3 * (1e-3 + 390e-6))
    assert found.slots_s == pytest.approx(3 * (1e-4 + 80e-6 + 39e-6))
    assert found.submit_s == pytest.approx(3 * (1e-5 + 40e-6))
    parts = found.compute_s + found.predict_s + found.slots_s + found.submit_s + found.wait_s
    assert found.step_s == pytest.approx(parts) == pytest.approx(1 / found.tokens_per_s)


def test_a_slow_disk_changes_only_the_wait() -> None:
    fast, slow = (step_cost(model(), disk(times), traffic(80, 40), **SETTING) for times in (1.0, 20.0))
    assert slow.wait_s > fast.wait_s + 0.9 * (slow.read_s - fast.read_s) - 3 * 2e-3
    assert (slow.compute_s, slow.predict_s, slow.slots_s) == (fast.compute_s, fast.predict_s, fast.slots_s)


def test_paced_bursts_give_the_hidden_time_and_sustained_ones_the_least_step_time() -> None:
    """A disk with a limit of reads per second answers single bursts quickly, but not all reads of a large step."""
    quick, limited = disk(0.1).bursts, disk(20.0)
    bucket = dataclasses.replace(limited, paced=quick)
    few, many = (step_cost(model(), bucket, traffic(80, reads), **SETTING) for reads in (1.0, 60.0))
    assert few.wait_s == step_cost(model(), disk(0.1), traffic(80, 1), **SETTING).wait_s
    sustained = limited.burst_s(np.array([60.0] * 3), np.array([8192.0] * 3)).sum()
    assert many.step_s == pytest.approx(sustained)
    assert many.step_s < step_cost(model(), limited, traffic(80, 60), **SETTING).step_s
    assert bucket.burst_s(np.array([4.0]), np.array([4096.0]), paced=True)[0] == pytest.approx(0.1 * burst_s(4, 4096))


def test_reuse_rate_is_the_share_of_groups_without_a_read() -> None:
    assert traffic(80, 20).reuse_rate == pytest.approx(0.75)
