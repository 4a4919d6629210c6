"""LongBench (Bai et al., arXiv 2308.14508), from public JSONL files that the user gives with ``--dataset FILE``.

Each line of a file is one JSON object with ``input``, ``context``, ``answers`` and ``all_classes``, as published.
Contexts that are too long lose their middle, as in LongBench. Classification is scored by the class that the answer
names, everything else by word overlap (F1) with the best answer. For summaries and code the official metrics are
better.
"""

from __future__ import annotations

import collections
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvswap.errors import InputError
from kvswap.lab.evals.samples import DATASETS, Outcome, Prompt, Sample, Source, Task, ask, fit, forced_answer

NEW_TOKENS = 64
FIELDS = {"input": str, "context": str, "answers": list}


def read_dataset(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file. Raises InputError with the number of the wrong line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"dataset {path}: {error}", hint="give a LongBench JSONL file") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"dataset {path}, line {number}: not JSON: {error}", hint="each line must be one JSON object"
            ) from error
        wrong = _wrong(row)
        if wrong:
            raise InputError(f"dataset {path}, line {number}: {wrong}", hint=f"each line needs {', '.join(FIELDS)}")
        rows.append(row)
    if not rows:
        raise InputError(f"dataset {path}: empty", hint="give a LongBench JSONL file")
    return rows


def _wrong(row: Any) -> str:
    """Describe what is wrong with a row; empty where nothing is."""
    if not isinstance(row, dict):
        return "not an object"
    for name, kind in FIELDS.items():
        if not isinstance(row.get(name), kind):
            return f"{name!r} is missing or not a {kind.__name__}"
    if not row["answers"] or not all(isinstance(answer, str) for answer in row["answers"]):
        return "'answers' is not a list of strings with at least one entry"
    classes = row.get("all_classes")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(each, str) for each in classes)):
        return "'all_classes' is not a list of strings"
    return ""


def samples(source: Source, context: int, count: int) -> Iterator[Sample]:
    """Yield samples from the first ``count`` rows of every file. Raises InputError where no file was given."""
    if not source.datasets:
        raise InputError("task longbench: no data", hint="give one or more JSONL files with --dataset")
    index = 0
    for path in source.datasets:
        for row in read_dataset(path)[:count]:
            words, question = row["context"].split(" "), row["input"] or "What is the text about?"

            def build(n: int, words: list[str] = words, question: str = question) -> list[Prompt]:
                kept = words if n >= len(words) else [*words[: n // 2], *words[len(words) - (n - n // 2) :]]
                return [ask(source, " ".join(kept), question, "")]

            yield Sample(
                context=context,
                index=index,
                text=index,
                prompt=fit(context, build, len(words))[0],
                forced=forced_answer(source, row["answers"][0]),
                answers=tuple(row["answers"]),
                max_new_tokens=NEW_TOKENS,
                labels={"dataset": path.stem, "classes": row.get("all_classes")},
            )
            index += 1


def score(sample: Sample, outcome: Outcome) -> float:
    """Score an answer: word F1 with the best answer, or for classification 1 / (classes named) if it is correct."""
    text, classes = outcome.text or "", sample.labels.get("classes")
    if classes:
        named = [each for each in classes if each in text]
        return float(sample.answers[0] in named) / max(1, len(named))
    return max(f1(text, answer) for answer in sample.answers)


def f1(text: str, answer: str) -> float:
    """F1 of the words of two texts, ignoring case, articles and punctuation."""
    found, expected = _words(text), _words(answer)
    same = sum((collections.Counter(found) & collections.Counter(expected)).values())
    return 2 * same / (len(found) + len(expected)) if same else 0.0


def _words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in plain.split() if word not in ("a", "an", "the")]


LONGBENCH = Task(
    name="longbench",
    summary="questions of LongBench files (--dataset)",
    make=samples,
    score=score,
    text_kind=DATASETS,
)
