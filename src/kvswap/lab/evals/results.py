"""Records of samples, and what they add up to: one row for each task, method, context, memory limit and setting.

A record is a plain dictionary, as it stands in the results file. Rows compare every method with ``full`` on the same
samples. Scores are better when higher; KL and nll are in nats a token. Samples about one text are not independent, so
standard errors are those of the texts (a cluster-robust error; where every text has one sample, the ordinary one).
"""

from __future__ import annotations

import collections
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]
FEW_TEXTS = 8
ROW = ("task", "method", "context", "kv_memory", "setting")


def summarise(records: Iterable[Record]) -> list[Record]:
    """Rows in the order in which their first samples came."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    full: dict[tuple[Any, ...], Record] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in ROW), []).append(record)
        if record["method"] == "full":
            full[_place(record)] = record
    return [_row(rows, [full[_place(each)] for each in rows if _place(each) in full]) for rows in groups.values()]


def _place(record: Record) -> tuple[Any, ...]:
    return record["task"], record["context"], record["index"], record["prompt_hash"]


def _row(rows: Sequence[Record], full: Sequence[Record]) -> Record:
    first, count = rows[0], len(rows)
    score, full_score = _mean(rows, "score"), _mean(full, "score")
    texts = len({each["text_number"] for each in rows})
    notes = [_few(count, texts)] if texts < FEW_TEXTS else []
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
    }
    if len(full) == count:
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
    """Standard error of the mean of ``values``, one a row, by texts; None for a single text."""
    mean = statistics.fmean(values)
    sums: dict[int, float] = collections.defaultdict(float)
    for row, value in zip(rows, values, strict=True):
        sums[row["text_number"]] += value - mean
    if len(sums) < 2:
        return None
    spread = sum(each * each for each in sums.values()) * len(sums) / (len(sums) - 1)
    return float(spread**0.5) / len(values)
