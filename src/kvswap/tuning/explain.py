"""Explain the tuner's choice: one line for each parameter, with what the nearest alternatives would change.

``tune.tune`` calls ``reasons`` and stores the lines in the solution. Values in, text out.
"""

from __future__ import annotations

from collections.abc import Callable

from kvswap.config import Config
from kvswap.tuning.cost import DiskCosts
from kvswap.tuning.search import Candidate
from kvswap.units import KIB, format_bytes, format_us


def reasons(chosen: Candidate, found: list[Candidate], disk: DiskCosts, layers: int) -> list[str]:
    """Return lines about sketch, group size, selection by layer, read gap (where not the default), reuse and disk.

    ``found`` are all candidates of the search; ``layers`` is the number of offloaded layers.
    """
    gap_bytes = Config().read_gap_bytes
    plain = [other for other in found if other.config.read_gap_bytes == gap_bytes]
    return [
        _sketch(chosen, plain),
        _group(chosen, plain, layers),
        _layers(chosen, plain),
        *([_gap(chosen, plain, layers)] if chosen.config.read_gap_bytes != gap_bytes else []),
        _reuse(chosen, layers),
        _disk(chosen, disk),
    ]


def _sketch(chosen: Candidate, found: list[Candidate]) -> str:
    text = f"sketch: {chosen.sketch}, {chosen.sketch.token_bytes} bytes per token and layer"
    others = [
        other
        for other in _like(chosen, found, lambda other: other.config.group_tokens)
        if other.sketch != chosen.sketch
    ]
    if not others:
        return f"{text}; no other sketch fits the limit"
    best = min(others, key=lambda other: other.expected_kl)
    return f"{text}; {best.sketch} would have {_against(best, chosen)}"


def _group(chosen: Candidate, found: list[Candidate], layers: int) -> str:
    group_tokens, cost = chosen.config.group_tokens, chosen.cost
    hidden = 1 - min(1.0, cost.wait_s / cost.read_s) if cost.read_s else 1.0
    size = cost.read_bytes / max(1.0, cost.reads) / KIB
    text = (
        f"G = {group_tokens}: {cost.reads / layers:.0f} reads of {size:.1f} KiB per layer take "
        f"{format_us(cost.read_s / layers)}, {hidden:.0%} of it hidden behind computation"
    )
    same = {other.config.group_tokens: other for other in _like(chosen, found, lambda other: other.sketch)}
    for other in (same.get(group_tokens // 2), same.get(group_tokens * 2)):
        if other is not None:
            text += f"; G = {other.config.group_tokens} would have {_against(other, chosen)}"
    return text


def _layers(chosen: Candidate, found: list[Candidate]) -> str:
    same = [
        other
        for other in found
        if (other.sketch, other.config.group_tokens) == (chosen.sketch, chosen.config.group_tokens)
        and other.by_layer != chosen.by_layer
    ]
    counts = chosen.config.layer_select_tokens
    mean = chosen.config.select_tokens
    if counts is None:
        tail = f"; different numbers by layer would have {_against(same[0], chosen)}" if same else ""
        return f"M = {mean} in every layer{tail}"
    tail = f"; {mean} in every layer would have {_against(same[0], chosen)}" if same else ""
    return f"M from {min(counts)} to {max(counts)} by layer, {mean} on average{tail}"


def _gap(chosen: Candidate, plain: list[Candidate], layers: int) -> str:
    default = chosen.config.replace(read_gap_bytes=Config().read_gap_bytes)
    other = next(each for each in plain if each.config == default)
    size = format_bytes(other.cost.read_bytes / max(1.0, other.cost.reads))
    return (
        f"gap: reads are merged across gaps of up to {format_bytes(chosen.config.read_gap_bytes)}; with "
        f"{format_bytes(default.read_gap_bytes)}, as in the comparisons above, {other.cost.reads / layers:.0f} reads "
        f"of {size} per layer would take {other.cost.step_s / chosen.cost.step_s - 1:+.0%} time"
    )


def _reuse(chosen: Candidate, layers: int) -> str:
    if not chosen.reuse_slots:
        return "reuse: none; the limit leaves no memory for it, or keeping groups would cost more time than it saves"
    return (
        f"reuse: the remaining {format_bytes(chosen.memory_parts['slots'])} hold {chosen.reuse_slots / layers:.0f} "
        f"groups per layer, and {chosen.traffic.reuse_rate:.0%} of the selected groups are in memory already"
    )


def _disk(chosen: Candidate, disk: DiskCosts) -> str:
    depth = max(point.depth for point in disk.bursts)
    size = min(point.read_bytes for point in disk.bursts)
    most = next(point for point in disk.bursts if (point.read_bytes, point.depth) == (size, depth))
    peak = max(rate for _, rate in disk.peak_rates())
    rate = most.depth / most.burst_s
    return (
        f"disk: {disk.backend} reaches {rate:,.0f} small reads/s and {peak / 1e6:,.0f} MB/s; at the first rate the "
        f"{chosen.cost.reads:,.0f} reads of a step take {chosen.cost.reads / rate / chosen.cost.step_s:.0%} of its "
        f"time, at the second their bytes take {chosen.cost.read_bytes / peak / chosen.cost.step_s:.0%}"
    )


def _like(chosen: Candidate, found: list[Candidate], key: Callable[[Candidate], object]) -> list[Candidate]:
    """Candidates that agree with ``chosen`` in ``key`` and in how they select by layer."""
    return [other for other in found if key(other) == key(chosen) and other.by_layer == chosen.by_layer]


def _against(other: Candidate, chosen: Candidate) -> str:
    """Describe the other's expected KL and time relative to the chosen one's."""
    kl = other.expected_kl / max(chosen.expected_kl, 1e-12) - 1
    time = other.cost.step_s / chosen.cost.step_s - 1
    return f"{kl:+.0%} KL and take {time:+.0%} time"
