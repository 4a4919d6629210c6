"""Summarise the records of an evaluation: one row for each task, method, context, memory limit and setting.

A record is one sample with one variant, as a plain dictionary of the results file. Rows compare every variant with
``full`` on the same samples. Higher scores are better; KL and nll are in nats per token.

Samples about one text are not independent. Standard errors are therefore cluster-robust, with texts as clusters. Where
every text has one sample, this is the ordinary standard error. Values in, values out.
"""

from __future__ import annotations

import collections
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]
FEW_TEXTS = 8
"""With fewer texts than this, a row gets a note that its standard error is uncertain."""
ROW = ("task", "method", "context", "kv_memory", "setting")


def summarise(records: Iterable[Record]) -> list[Record]:
    """Return one row for each combination of the keys in ROW, in the order of their first records."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    full: dict[tuple[Any, ...], Record] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in ROW), []).append(record)
        if record["method"] == "full":
            full[_place(record)] = record
    return [_row(rows, [full[_place(each)] for each in rows if _place(each) in full]) for rows in groups.values()]


def _place(record: Record) -> tuple[Any, ...]:
    """What identifies a sample of a task, whatever the variant."""
    return record["task"], record["context"], record["index"], record["prompt_hash"]


def _row(rows: Sequence[Record], full: Sequence[Record]) -> Record:
    """Summarise the records of one row; ``full`` are the records of full attention on the same samples."""
    first, count = rows[0], len(rows)
    score, full_score = _mean(rows, "score"), _mean(full, "score")
    texts = len({each["text_number"] for each in rows})
    notes = [_few(count, texts)] if texts < FEW_TEXTS else []
    if first["text_tokens"] and texts * first["context"] > first["text_tokens"]:
        notes.append("the texts overlap, so the standard error is too small: add text with --document")
    if full_score == 0:
        notes.append("full attention scores 0, so there is nothing to retain")
    row: Record = {key: first[key] for key in ROW}
    row |= {
        "kv_memory_limit_bytes": _largest(rows, "kv_memory_limit_bytes"),
        "kv_memory_peak_bytes": _largest(rows, "kv_memory_peak_bytes"),
        "sketch": first["sketch"],
        "n": count,
        "texts": texts,
        "score": score,
        "stderr": _error(rows, [each["score"] for each in rows]),
        "full_score": full_score,
        "retention": score / full_score if score is not None and full_score else None,
        "text_kind": first["text_kind"],
    }
    if len(full) == count:
        row["retention_stderr"] = _ratio_error(rows, full)
        for key, name in (("score", "difference"), ("nll", "nll_difference")):
            differences = [a[key] - b[key] for a, b in zip(rows, full, strict=True)]
            row |= {name: statistics.fmean(differences), f"{name}_stderr": _error(rows, differences)}
    row |= {
        "kl": _mean(rows, "kl"),
        "kl_stderr": _error(rows, [each["kl"] for each in rows]),
        "same": _mean(rows, "same"),
        "mass": _mean([each for each in rows if each["mass"] is not None], "mass"),
        "nll": _mean(rows, "nll"),
        "full_nll": _mean(full, "nll"),
        "note": "; ".join(notes),
    }
    return row


def _ratio_error(rows: Sequence[Record], full: Sequence[Record]) -> float | None:
    """Standard error of the retention: of the mean difference to its expectation, as a share of full's mean score."""
    own, whole = ([each["score"] for each in records] for records in (rows, full))
    if not any(whole):
        return None
    ratio = sum(own) / sum(whole)
    error = _error(rows, [a - ratio * b for a, b in zip(own, whole, strict=True)])
    return None if error is None else error / statistics.fmean(whole)


def _few(count: int, texts: int) -> str:
    what = f"only {count} samples" if texts == count else f"only {texts} texts"
    if count == 1:
        return "one sample: no standard error"
    if texts == 1:
        return f"{count} samples of one text: no standard error"
    return f"{what}: the standard error is itself uncertain"


def _mean(rows: Sequence[Record], key: str) -> float | None:
    return statistics.fmean(each[key] for each in rows) if rows else None


def _largest(rows: Sequence[Record], key: str) -> int | None:
    return max((each[key] for each in rows if each[key] is not None), default=None)


def _error(rows: Sequence[Record], values: Sequence[float]) -> float | None:
    """Cluster-robust standard error of the mean of ``values``, with texts as clusters; None for a single text."""
    mean = statistics.fmean(values)
    sums: dict[int, float] = collections.defaultdict(float)
    for row, value in zip(rows, values, strict=True):
        sums[row["text_number"]] += value - mean
    if len(sums) < 2:
        return None
    spread = sum(each * each for each in sums.values()) * len(sums) / (len(sums) - 1)
    return float(spread**0.5) / len(values)
