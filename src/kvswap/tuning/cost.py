"""What a decode step costs, from a profile and the parameters: times by part. Pure arithmetic.

The parts of a step, as ``CacheStats`` measures them: *compute* (linear layers, attention over what is resident, norms,
the head), *predict* (the query and the scores), *slots* (looking groups up, gathering, keeping), *submit* (starting
reads) and *wait* (reads that had not arrived when their layer needed them). Reads of a layer are under way while the
layer before computes, so only what that does not cover is waited for (KVSwap, arXiv 2511.11907, appendix A).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PEAK_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class BurstRate:
    """``depth`` random reads of ``read_bytes`` asked for at once: mean time until the last has arrived."""

    read_bytes: int
    depth: int
    burst_s: float

    @property
    def bytes_per_s(self) -> float:
        """Rate of such bursts, one after the other."""
        return self.depth * self.read_bytes / self.burst_s


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskCosts:
    """One backend on one folder. ``latency_us``: p50 and p99 of single reads by their size in bytes.

    ``collect_s`` is what waiting costs when everything has arrived already. ``bursts`` follow one another without a
    pause and show what the disk can keep up; ``paced`` ones come after a pause as long as a burst takes, at least as
    long as a layer computes: a disk with a cache, or under a limit of so much a second, answers those sooner. Where
    ``paced`` is empty they are taken to be the same.
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
        """Read size and the best rate over all depths, by size."""
        sizes = sorted({point.read_bytes for point in self.bursts})
        return [(size, max(p.bytes_per_s for p in self.bursts if p.read_bytes == size)) for size in sizes]

    def read_size_bytes(self) -> int:
        """The smallest measured read that reaches four fifths of the best rate: reads of this size are well used."""
        rates = self.peak_rates()
        best = max(rate for _, rate in rates)
        return next(size for size, rate in rates if rate >= PEAK_SHARE * best)

    def burst_s(self, reads: Floats, read_bytes: Floats, *, paced: bool = False) -> Floats:
        """Time of bursts of ``reads`` reads with ``read_bytes`` each (arrays of one shape); 0 for no reads.

        Interpolated in the logarithms; past the measured ends time grows with the count and with the bytes.
        """
        points = self.paced if paced and self.paced else self.bursts
        sizes = np.array(sorted({point.read_bytes for point in points}), float)
        depths = np.array(sorted({point.depth for point in points}), float)
        times = {(point.read_bytes, point.depth): point.burst_s for point in points}
        table = np.log([[times[int(size), int(depth)] for depth in depths] for size in sizes])
        size, depth = np.maximum(read_bytes, 1.0), np.maximum(reads, 1.0)
        inside_size, inside_depth = np.clip(size, sizes[0], sizes[-1]), np.clip(depth, depths[0], depths[-1])
        row, row_share = _place(np.log(sizes), np.log(inside_size))
        column, column_share = _place(np.log(depths), np.log(inside_depth))
        low = table[row, column] * (1 - column_share) + table[row, column + 1] * column_share
        high = table[row + 1, column] * (1 - column_share) + table[row + 1, column + 1] * column_share
        burst = np.exp(low * (1 - row_share) + high * row_share)
        burst = burst * (depth / inside_depth) * np.maximum(1.0, size / inside_size)
        return np.where(reads > 0, burst * np.minimum(1.0, reads), 0.0)


def _place(ends: Floats, values: Floats) -> tuple[NDArray[np.intp], Floats]:
    """Which interval of ``ends`` each value is in, and how far into it."""
    index = np.clip(np.searchsorted(ends, values, side="right") - 1, 0, len(ends) - 2)
    return index, (values - ends[index]) / (ends[index + 1] - ends[index])


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictCost:
    """Scoring ``tokens`` sketched tokens of one layer and choosing groups."""

    tokens: int
    rank: int
    bits: int
    cost_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCost:
    """A cost that grows with several counts: ``base_s + sum(per[i] * count[i])``."""

    base_s: float
    per: dict[str, float]

    def of(self, **counts: Floats | float) -> Floats:
        """The cost in seconds; counts by the names in ``per``, numbers or arrays of one shape."""
        total = np.float64(self.base_s) + sum(rate * np.asarray(counts[name], float) for name, rate in self.per.items())
        return np.asarray(total)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCosts:
    """One model on one machine. All costs but ``outside_s`` and ``prefill_tokens_per_s`` are of one offloaded layer.

    ``outside_s``: what a step does outside of the layers (head, embeddings, sampling apart). ``compute`` is linear in
    ``attended`` tokens; ``slots`` in selected ``groups``, ``attended`` tokens and reuse ``capacity`` in slots;
    ``submit`` in ``reads``. Other layers (sliding windows) are in ``outside_s``.
    """

    prefill_tokens_per_s: float
    outside_s: float
    query_s: float
    compute: LinearCost
    slots: LinearCost
    submit: LinearCost
    predict: list[PredictCost]

    def predict_s(self, tokens: int, rank: int, bits: int) -> float:
        """Scoring and choosing over ``tokens`` of one layer, the query included."""
        points = [point for point in self.predict if point.bits == bits]
        ranks = sorted({point.rank for point in points})
        costs = []
        for each in ranks:
            line = sorted((point.tokens, point.cost_s) for point in points if point.rank == each)
            costs.append(_line(tokens, [count for count, _ in line], [cost for _, cost in line]))
        return self.query_s + max(0.0, _line(rank, ranks, costs))


def _line(value: float, places: Sequence[float], values: Sequence[float]) -> float:
    """Piecewise linear, going on at both ends with the slope of the last piece."""
    if len(places) == 1:
        return float(values[0])
    i = int(np.clip(np.searchsorted(places, value) - 1, 0, len(places) - 2))
    slope = (values[i + 1] - values[i]) / (places[i + 1] - places[i])
    return float(values[i] + slope * (value - places[i]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What one step asks for, by layer: arrays ``[L]`` of means over steps."""

    selected_groups: Floats
    missed_groups: Floats
    reads: Floats
    read_bytes: Floats

    @property
    def reuse_rate(self) -> float:
        """Selected groups that need no read, as a share of all."""
        selected = float(self.selected_groups.sum())
        return 1.0 - float(self.missed_groups.sum()) / selected if selected else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Seconds of one decode step by part, and what the disk does in it. ``read_s`` is hidden or waited for."""

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
        """The whole step."""
        return self.compute_s + self.predict_s + self.slots_s + self.submit_s + self.wait_s

    @property
    def tokens_per_s(self) -> float:
        """Steps a second."""
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
    """Cost of a step at a context of ``tokens``; ``pinned_tokens`` are attended to beside the selected groups."""
    layers = len(traffic.reads)
    attended = traffic.selected_groups * group_tokens + pinned_tokens
    compute = model.compute.of(attended=attended)
    slots = model.slots.of(groups=traffic.selected_groups, attended=attended, capacity=float(reuse_slots))
    submit = model.submit.of(reads=traffic.reads)
    predict = model.predict_s(tokens, rank, bits)
    mean_bytes = traffic.read_bytes / np.maximum(traffic.reads, 1e-9)
    burst = disk.burst_s(traffic.reads, mean_bytes, paced=True)
    # A layer's reads start before the layer in front of it computes. Nothing is in front of the first layer: only the
    # prediction for the second one lies between its reads and its attention.
    covered = np.concatenate(([predict + submit[min(1, layers - 1)]], (compute + slots)[:-1]))
    wait = float(np.maximum(disk.collect_s, burst - submit - covered).sum())
    busy = model.outside_s + float((compute + slots + submit).sum()) + predict * layers
    # Whatever hides behind what, a step is no shorter than the disk needs for all of its reads.
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
