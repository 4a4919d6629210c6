"""The search: which candidates fit, which is best, and that a slow disk gets larger groups."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from kvswap.config import Config
from kvswap.errors import MemoryBudgetError
from kvswap.memory.budget import STEP_GROUPS
from kvswap.tuning.cost import DiskCosts, ModelFacts
from kvswap.tuning.explain import reasons
from kvswap.tuning.profile import Profile, stamp_of
from kvswap.tuning.search import FINALISTS, KL_SLACK, LEAST_GAIN, TIME_SLACK, Candidate, Pricing, Request, search
from kvswap.tuning.tables import GROUPS
from kvswap.units import MIB
from tests.tuning.test_cost import disk, model
from tests.tuning.test_tables import LAYERS, tables

FACTS = ModelFacts(
    name="tiny",
    fingerprint="abc",
    layers=LAYERS,
    query_heads=9,
    kv_heads=3,
    head_dim=64,
    compute_itemsize_bytes=4,
    store_itemsize_bytes=2,
    longest_tokens=32768,
    threads=2,
)


def pricing(folder: Path, curve: DiskCosts | None = None) -> Pricing:
    known = Profile(stamp=stamp_of(folder), made="now", disks=[curve or disk()], model=FACTS, costs=model())
    return Pricing(known, tables(), FACTS, torch.device("cpu"))


def found(folder: Path, curve: DiskCosts | None = None, prefer: str = "quality", limit: int = 12 * MIB) -> Candidate:
    request = Request(limit_bytes=limit, context_tokens=8192, batch=1, select_tokens=400)
    return search(pricing(folder, curve), request, prefer=prefer, on_step=lambda done, total: None)[0]


def fewer_reads(curve: DiskCosts) -> DiskCosts:
    """A disk that takes 1 ms for each read, whatever its size."""
    points = [dataclasses.replace(point, burst_s=1e-3 * point.depth) for point in curve.bursts]
    return dataclasses.replace(curve, bursts=points)


def test_a_slow_disk_gets_larger_groups(tmp_path: Path) -> None:
    fast, slow = found(tmp_path), found(tmp_path, fewer_reads(disk()))
    assert slow.config.group_tokens > fast.config.group_tokens
    assert slow.cost.wait_s > fast.cost.wait_s


def test_without_a_number_m_is_that_of_the_default(tmp_path: Path) -> None:
    """It grows with the context, is less on a slow disk, and takes at most half of what a limit has to spare."""

    def chosen(context: int, limit: int, curve: DiskCosts | None = None) -> int:
        request = Request(limit_bytes=limit, context_tokens=context, batch=1, select_tokens=None)
        prices = pricing(tmp_path, curve)
        best, every = search(prices, request, prefer="quality", on_step=lambda done, total: None)
        config = best.config
        assert sum(best.memory_parts.values()) <= limit
        assert {each.config.select_tokens for each in every} >= {config.select_tokens}
        return int(config.select_tokens)

    fast = disk()
    fast = dataclasses.replace(
        fast, bursts=[dataclasses.replace(each, burst_s=each.depth / 50_000) for each in fast.bursts]
    )
    assert fast.small_reads_per_s() == pytest.approx(50_000)
    expected = Config().selected_tokens(8192)
    assert 0 <= expected - chosen(8192, 200 * MIB, fast) <= STEP_GROUPS * max(GROUPS)
    assert chosen(1024, 200 * MIB, fast) == 400
    assert chosen(8192, 200 * MIB, fewer_reads(fast)) < expected / 2
    assert 400 <= chosen(8192, 12 * MIB, fast) < expected


def test_the_preferred_measure_is_best_within_the_slack_of_the_other(tmp_path: Path) -> None:
    request = Request(limit_bytes=12 * MIB, context_tokens=8192, batch=1, select_tokens=400)
    prices = pricing(tmp_path)
    quality, every = search(prices, request, prefer="quality", on_step=lambda done, total: None)
    speed, _ = search(prices, request, prefer="speed", on_step=lambda done, total: None)
    fastest, best = min(each.cost.step_s for each in every), min(each.expected_kl for each in every)
    assert quality.cost.step_s <= TIME_SLACK * fastest and speed.expected_kl <= KL_SLACK * best
    fast = [each for each in every if each.cost.step_s <= TIME_SLACK * fastest]
    good = [each for each in every if each.expected_kl <= KL_SLACK * best]
    assert not [each for each in fast if each.expected_kl < quality.expected_kl]
    assert not [each for each in good if each.cost.step_s < speed.cost.step_s]
    assert all(sum(each.memory_parts.values()) <= request.limit_bytes for each in every)
    assert all(each.kl_bound > each.expected_kl for each in every)
    assert quality.by_layer  # which the tables say is better by a fifth
    lines = reasons(quality, every, disk(), LAYERS)
    assert [line.split(":")[0].split(" ")[0] for line in lines] == ["sketch", "G", "M", "reuse", "disk"]


def test_more_memory_gives_more_reuse_or_a_richer_sketch(tmp_path: Path) -> None:
    small, large = found(tmp_path, limit=6 * MIB), found(tmp_path, limit=24 * MIB)
    assert large.reuse_slots > small.reuse_slots or large.sketch.token_bytes > small.sketch.token_bytes
    assert large.expected_kl <= small.expected_kl * 1.01


def test_an_error_for_a_small_limit_names_the_smallest_one(tmp_path: Path) -> None:
    with pytest.raises(MemoryBudgetError, match="too small for 1 x 8,192 tokens") as caught:
        found(tmp_path, limit=MIB)
    assert sum(caught.value.parts.values()) == caught.value.minimum_bytes > MIB
    assert found(tmp_path, limit=caught.value.minimum_bytes).reuse_slots == 0


def test_a_batch_needs_more_and_is_slower(tmp_path: Path) -> None:
    prices = pricing(tmp_path)
    one, two = (
        search(
            prices,
            Request(limit_bytes=24 * MIB, context_tokens=4096, batch=batch, select_tokens=400),
            prefer="quality",
            on_step=lambda done, total: None,
        )[0]
        for batch in (1, 2)
    )
    assert two.cost.step_s > one.cost.step_s and two.memory_parts["sketch"] > 0


def costly_requests(request_s: float) -> DiskCosts:
    """A disk of 250 MB/s where each request takes ``request_s`` in addition to its bytes."""
    points = [
        dataclasses.replace(point, burst_s=1e-4 + point.depth * (request_s + point.read_bytes / 250e6))
        for point in disk().bursts
    ]
    return dataclasses.replace(disk(), bursts=points)


def test_reads_merge_across_longer_gaps_where_requests_are_expensive(tmp_path: Path) -> None:
    cheap, costly = costly_requests(10e-6), costly_requests(500e-6)
    default = Config().read_gap_bytes
    assert found(tmp_path, cheap).config.read_gap_bytes == default
    request = Request(limit_bytes=12 * MIB, context_tokens=8192, batch=1, select_tokens=400)
    prices = pricing(tmp_path, costly)
    chosen, every = search(prices, request, prefer="quality", on_step=lambda done, total: None)
    assert chosen.config.read_gap_bytes > default
    same = prices.price(chosen.config.replace(read_gap_bytes=default), request)
    assert same is not None and same.expected_kl == chosen.expected_kl and same.memory_parts == chosen.memory_parts
    assert chosen.cost.step_s <= (1 - LEAST_GAIN) * same.cost.step_s
    assert chosen.cost.reads < same.cost.reads and chosen.cost.read_bytes > same.cost.read_bytes
    line = next(line for line in reasons(chosen, every, costly, LAYERS) if line.startswith("gap: "))
    assert "64.0 KiB" in line and "with 16.0 KiB" in line
    assert f"{same.cost.step_s / chosen.cost.step_s - 1:+.0%} time" in line


def test_only_the_best_few_are_priced_again(tmp_path: Path) -> None:
    """The read gap must not multiply the time of the search."""
    request = Request(limit_bytes=12 * MIB, context_tokens=8192, batch=1, select_tokens=400)
    _, every = search(pricing(tmp_path, costly_requests(500e-6)), request, prefer="speed", on_step=lambda *_: None)
    longer = [each for each in every if each.config.read_gap_bytes != Config().read_gap_bytes]
    assert 1 <= len(longer) <= FINALISTS < len(every) / 5
