"""Records of a benchmark, and rows that summarise them by method, batch and context.

A record is one method on one batch of prompts with every step, as a plain dictionary of the results file. A row has
medians over turns and over batches of prompts; its ``spread`` has the lowest and highest values. Values in, values out.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from kvswap.app.stats import percentiles
from kvswap.lab.bench.interleaved import MethodRun

Record = dict[str, Any]


def record_of(method: str, place: Record, run: MethodRun, full: MethodRun | None) -> Record:
    """Return the record of one run.

    ``place`` has the keys context, batch, prompt and prompt_tokens; a variant's has ``config`` too. ``full`` is the run
    of full attention on the same prompts.
    """
    stats = run.stats
    assert stats is not None
    return {
        **place,
        "method": method,
        "prefill_s": run.prefill_s,
        "turns": [_rounded(dataclasses.asdict(turn)) for turn in run.turns],
        "full_step_s": None if full is None else [statistics.median(turn.step_s) for turn in full.turns],
        "kv_full_bytes": stats.kv_full_bytes,
        "kv_memory_limit_bytes": stats.kv_memory_limit_bytes,
        "kv_memory_peak_bytes": stats.kv_memory_peak_bytes,
        "memory_parts": stats.memory_parts,
        "prefill_peak_bytes": stats.prefill_peak_bytes,
        "backend": stats.backend,
        "direct_io": stats.direct_io,
        "sketch": stats.sketch,
    }


def _rounded(turn: Record) -> Record:
    """Round times to a microsecond."""
    spent = {name: round(value, 6) for name, value in turn["spent"].items()}
    return {**turn, "step_s": [round(each, 6) for each in turn["step_s"]], "spent": spent}


def summarise(records: Iterable[Record]) -> list[Record]:
    """Return one row for each method, batch and context, in the order of their first records."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault((record["method"], record["batch"], record["context"]), []).append(record)
    return [_row(each) for each in groups.values()]


def _row(records: Sequence[Record]) -> Record:
    first = records[0]
    batch = first["batch"]
    turns = [turn for record in records for turn in record["turns"]]
    seconds = [sum(turn["step_s"]) for turn in turns]
    tokens = [batch * len(turn["step_s"]) for turn in turns]
    rates = [count / took_s for count, took_s in zip(tokens, seconds, strict=True)]
    prefills = [record["prefill_s"] for record in records if record["prefill_s"] is not None]
    read = [turn["spent"]["disk_read_bytes"] / count for turn, count in zip(turns, tokens, strict=True)]
    reads, read_bytes = _sum(turns, "disk_reads"), _sum(turns, "disk_read_bytes")
    bandwidth = [turn["spent"]["disk_read_bytes"] / took_s for turn, took_s in zip(turns, seconds, strict=True)]
    ratios = [
        full_s / statistics.median(turn["step_s"])
        for record in records
        for full_s, turn in zip(record["full_step_s"] or [], record["turns"], strict=False)
    ]
    waits = [turn["spent"]["io_wait_s"] / took_s for turn, took_s in zip(turns, seconds, strict=True)]
    return {
        "method": first["method"],
        "batch": batch,
        "context": first["context"],
        "prompts": len(records),
        "turns": len(turns),
        "config": first.get("config"),
        "decode_tokens_per_s": statistics.median(rates),
        "decode_speed_of_full": statistics.median(ratios) if ratios else None,
        "prefill_tokens_per_s": batch * first["prompt_tokens"] / statistics.median(prefills) if prefills else None,
        "ttft_s": statistics.median(prefills) if prefills else None,
        "itl_ms": percentiles([1e3 * each for turn in turns for each in turn["step_s"]]),
        "kl": _mean(turns, "kl"),
        "top1": _mean(turns, "same"),
        "kv_memory_limit_bytes": first["kv_memory_limit_bytes"],
        "kv_memory_peak_bytes": max(record["kv_memory_peak_bytes"] for record in records),
        "kv_full_bytes": max(record["kv_full_bytes"] for record in records),
        "prefill_peak_bytes": max(record["prefill_peak_bytes"] for record in records),
        "read_bytes_per_token": statistics.median(read),
        "read_size_bytes": read_bytes / reads if reads else None,
        "read_bytes_per_s": statistics.median(bandwidth),
        "exposed_wait_fraction": statistics.median(waits),
        "overhead_fraction": _overhead(turns),
        "reuse_rate": _share(turns),
        "spread": {
            "decode_tokens_per_s": [min(rates), max(rates)],
            "decode_speed_of_full": [min(ratios), max(ratios)] if ratios else None,
            "ttft_s": [min(prefills), max(prefills)] if prefills else None,
        },
    }


def _sum(turns: Sequence[Record], name: str) -> float:
    return float(sum(turn["spent"][name] for turn in turns))


def _mean(turns: Sequence[Record], name: str) -> float | None:
    values = [turn[name] for turn in turns if turn[name] is not None]
    return statistics.fmean(values) if values else None


def _share(turns: Sequence[Record]) -> float | None:
    selected = _sum(turns, "selected_groups")
    return _sum(turns, "reused_groups") / selected if selected else None


def _overhead(turns: Sequence[Record]) -> float:
    """Share of the step time for prediction, slots and submission."""
    parts = sum(_sum(turns, name) for name in ("predict_s", "slots_s", "submit_s"))
    return parts / sum(sum(turn["step_s"]) for turn in turns)
