"""The cost model: predict the time of a decode step from measured costs. Pure arithmetic, no torch, no clock.

``kvswap profile`` measures ``DiskCosts`` (this folder) and ``ModelCosts`` (this model). ``traffic.simulate`` gives the
``Traffic`` of a configuration: what its steps select and read. ``step_cost`` combines the three to a ``StepCost``.

A step has the parts that ``CacheStats`` measures:

* *compute*: linear layers, attention over the attended tokens, norms, the head;
* *predict*: the predicted query and the scores of the groups;
* *slots*: lookups, copies into slots, and the choice of what to keep;
* *submit*: starting reads;
* *wait*: reads that have not arrived when their layer needs them.

The reads of a layer run while the layer before it computes. The step waits only for the rest (KVSwap, arXiv
2511.11907, appendix A).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PEAK_SHARE = 0.8
"""Share of the best rate from which on a read size counts as efficient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BurstRate:
    """A burst: ``depth`` random reads of ``read_bytes``, submitted together. ``burst_s`` is its mean time."""

    read_bytes: int
    depth: int
    burst_s: float

    @property
    def bytes_per_s(self) -> float:
        """Bytes per second when such bursts follow one another."""
        return self.depth * self.read_bytes / self.burst_s


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskCosts:
    """What reads cost through one backend in one folder.

    Parameters
    ----------
    collect_s
        Time of a wait whose reads have all arrived before it.
    latency_us
        p50 and p99 of single reads, by their size in bytes.
    bursts
        Bursts without pauses. They show the rate that the disk sustains.
    paced
        Bursts after a pause as long as a burst or as a layer's computation, whichever is longer. Disks with a cache,
        or under a rate limit, answer those sooner. Empty: the same as ``bursts``.
    """

    backend: str
    direct_io: bool
    alignment_bytes: int
    write_bytes_per_s: float
    collect_s: float
    latency_us: dict[str, list[float]]
    bursts: list[BurstRate]
    paced: list[BurstRate]

    def peak_rates(self) -> list[tuple[int, float]]:
        """Each read size in bytes with its best rate over all depths in bytes per second, smallest size first."""
        sizes = sorted({point.read_bytes for point in self.bursts})
        return [(size, max(p.bytes_per_s for p in self.bursts if p.read_bytes == size)) for size in sizes]

    def small_reads_per_s(self) -> float:
        """Most reads a second of the measured size that is nearest to 4 KiB."""
        size = min((point.read_bytes for point in self.bursts), key=lambda each: abs(each - 4096))
        return max(point.depth / point.burst_s for point in self.bursts if point.read_bytes == size)

    def read_size_bytes(self) -> int:
        """The smallest measured read size that reaches 80 % of the best rate."""
        rates = self.peak_rates()
        best = max(rate for _, rate in rates)
        return next(size for size, rate in rates if rate >= PEAK_SHARE * best)

    def burst_s(self, reads: Floats, read_bytes: Floats, *, paced: bool = False) -> Floats:
        """Predict the seconds of bursts of ``reads`` reads with ``read_bytes`` each (float64 arrays of one shape).

        Times are interpolated in the logarithms of size and depth. Beyond the measured range they grow in proportion
        to the number of reads and to the bytes. No reads take no time.
        """
        points = self.paced if paced and self.paced else self.bursts
        sizes = np.array(sorted({point.read_bytes for point in points}), float)
        depths = np.array(sorted({point.depth for point in points}), float)
        times = {(point.read_bytes, point.depth): point.burst_s for point in points}
        table = np.log([[times[int(size), int(depth)] for depth in depths] for size in sizes])
        size, depth = np.maximum(read_bytes, 1.0), np.maximum(reads, 1.0)
        inside_size, inside_depth = np.clip(size, sizes[0], sizes[-1]), np.clip(depth, depths[0], depths[-1])
        row, row_share = _interval(np.log(sizes), np.log(inside_size))
        column, column_share = _interval(np.log(depths), np.log(inside_depth))
        low = table[row, column] * (1 - column_share) + table[row, column + 1] * column_share
        high = table[row + 1, column] * (1 - column_share) + table[row + 1, column + 1] * column_share
        burst = np.exp(low * (1 - row_share) + high * row_share)
        burst = burst * (depth / inside_depth) * np.maximum(1.0, size / inside_size)
        return np.where(reads > 0, burst * np.minimum(1.0, reads), 0.0)


def _interval(ends: Floats, values: Floats) -> tuple[NDArray[np.intp], Floats]:
    """For each value the index of its interval between ``ends``, and its position in the interval from 0 to 1."""
    index = np.clip(np.searchsorted(ends, values, side="right") - 1, 0, len(ends) - 2)
    return index, (values - ends[index]) / (ends[index + 1] - ends[index])


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Identity of a model and the parts of its shape that costs depend on.

    ``layers`` counts the offloaded layers. ``threads`` is torch's number of threads at the measurement.
    """

    name: str
    fingerprint: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    compute_itemsize_bytes: int
    store_itemsize_bytes: int
    longest_tokens: int
    threads: int

    @property
    def key_elements(self) -> int:
        """Elements of a token's key over all KV heads: D."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictCost:
    """Seconds to score ``tokens`` sketched tokens of one layer and to choose groups."""

    tokens: int
    rank: int
    bits: int
    cost_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCost:
    """A cost in seconds that is linear in several counts: ``base_s + sum(per[i] * count[i])``."""

    base_s: float
    per: dict[str, float]

    def of(self, **counts: Floats | float) -> Floats:
        """Return the cost in seconds. ``counts`` are numbers, or arrays of one shape, by the names in ``per``."""
        total = np.float64(self.base_s) + sum(rate * np.asarray(counts[name], float) for name, rate in self.per.items())
        return np.asarray(total)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCosts:
    """What one model costs on one machine. Costs are those of one offloaded layer unless said otherwise.

    Parameters
    ----------
    prefill_tokens_per_s
        Rate of prefill, for the whole model.
    outside_s
        Time of a step outside the offloaded layers, for the whole model: embeddings, head, sliding-window layers.
    query_s
        Time of the predicted query.
    compute
        Linear in ``attended`` tokens.
    slots
        Linear in selected ``groups``, ``attended`` tokens, and the ``capacity`` of reuse in slots.
    submit
        Linear in ``reads``.
    predict
        Time of scoring, at several lengths and sketch sizes.
    """

    prefill_tokens_per_s: float
    outside_s: float
    query_s: float
    compute: LinearCost
    slots: LinearCost
    submit: LinearCost
    predict: list[PredictCost]

    def predict_s(self, tokens: int, rank: int, bits: int) -> float:
        """Seconds to predict the query and choose groups among ``tokens`` tokens of one layer."""
        points = [point for point in self.predict if point.bits == bits]
        ranks = sorted({point.rank for point in points})
        costs = []
        for each in ranks:
            measured = sorted((point.tokens, point.cost_s) for point in points if point.rank == each)
            costs.append(_piecewise(tokens, [count for count, _ in measured], [cost for _, cost in measured]))
        return self.query_s + max(0.0, _piecewise(rank, ranks, costs))


def _piecewise(at: float, places: Sequence[float], values: Sequence[float]) -> float:
    """Piecewise linear interpolation; beyond both ends the slope of the outermost piece continues."""
    if len(places) == 1:
        return float(values[0])
    i = int(np.clip(np.searchsorted(places, at) - 1, 0, len(places) - 2))
    slope = (values[i + 1] - values[i]) / (places[i + 1] - places[i])
    return float(values[i] + slope * (at - places[i]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What one step selects and reads, by layer: float64 arrays ``[L]`` of means over steps."""

    selected_groups: Floats
    missed_groups: Floats
    reads: Floats
    read_bytes: Floats

    @property
    def reuse_rate(self) -> float:
        """Share of the selected groups that are in memory already."""
        selected = float(self.selected_groups.sum())
        return 1.0 - float(self.missed_groups.sum()) / selected if selected else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Predicted seconds of one decode step by part, with its reads.

    ``read_s`` is the time of all reads, whether hidden behind computation or waited for; it is not part of ``step_s``.
    """

    compute_s: float
    predict_s: float
    slots_s: float
    submit_s: float
    wait_s: float
    read_s: float
    reads: float
    read_bytes: float

    @property
    def step_s(self) -> float:
        """Seconds of the whole step."""
        return self.compute_s + self.predict_s + self.slots_s + self.submit_s + self.wait_s

    @property
    def tokens_per_s(self) -> float:
        """Steps per second."""
        return 1.0 / self.step_s


def step_cost(
    model: ModelCosts,
    disk: DiskCosts,
    traffic: Traffic,
    *,
    tokens: int,
    pinned_tokens: float,
    group_tokens: int,
    rank: int,
    bits: int,
    reuse_slots: int,
) -> StepCost:
    """Predict the cost of a step at a context of ``tokens``.

    ``pinned_tokens`` are attended to in addition to the selected groups.
    """
    layers = len(traffic.reads)
    attended = traffic.selected_groups * group_tokens + pinned_tokens
    compute = model.compute.of(attended=attended)
    slots = model.slots.of(groups=traffic.selected_groups, attended=attended, capacity=float(reuse_slots))
    submit = model.submit.of(reads=traffic.reads)
    predict = model.predict_s(tokens, rank, bits)
    mean_bytes = traffic.read_bytes / np.maximum(traffic.reads, 1e-9)
    burst = disk.burst_s(traffic.reads, mean_bytes, paced=True)
    # A layer's reads start before the previous layer computes. The first layer has no previous one: its reads overlap
    # only with the prediction for the second layer.
    covered = np.concatenate(([predict + submit[min(1, layers - 1)]], (compute + slots)[:-1]))
    wait = float(np.maximum(disk.collect_s, burst - submit - covered).sum())
    busy = model.outside_s + float((compute + slots + submit).sum()) + predict * layers
    # A step takes at least as long as the disk needs for all of its reads at the sustained rate.
    wait = max(wait, float(disk.burst_s(traffic.reads, mean_bytes).sum()) - busy)
    return StepCost(
        compute_s=model.outside_s + float(compute.sum()),
        predict_s=predict * layers,
        slots_s=float(slots.sum()),
        submit_s=float(submit.sum()),
        wait_s=wait,
        read_s=float(burst.sum()),
        reads=float(traffic.reads.sum()),
        read_bytes=float(traffic.read_bytes.sum()),
    )
