"""LongBench (Bai et al., arXiv 2308.14508) from the public JSONL files, if the user has them: ``--dataset FILE``.

One JSON object a line with ``input``, ``context``, ``answers`` and ``all_classes``, as published. Contexts that are too
long lose their middle, as there. Scores: classification by the class named, everything else by the overlap of words
(F1) with the best answer; summaries and code are better served by the official metrics.
"""

from __future__ import annotations

import collections
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvswap.errors import InputError
from kvswap.lab.evals.samples import Outcome, Prompt, Sample, Source, Task, ask, fit, forced_answer

NEW_TOKENS = 64
FIELDS = {"input": str, "context": str, "answers": list}


def read_dataset(path: Path) -> list[dict[str, Any]]:
    """Rows of a file. Raises InputError with the number of the line that is wrong."""
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
        except ValueError as error:
            raise InputError(f"dataset {path}, line {number}: not JSON: {error}", hint="one object a line") from error
        wrong = _wrong(row)
        if wrong:
            raise InputError(f"dataset {path}, line {number}: {wrong}", hint=f"it needs {', '.join(FIELDS)}")
        rows.append(row)
    if not rows:
        raise InputError(f"dataset {path}: empty", hint="give a LongBench JSONL file")
    return rows


def _wrong(row: Any) -> str:
    if not isinstance(row, dict):
        return "not an object"
    for name, kind in FIELDS.items():
        if not isinstance(row.get(name), kind):
            return f"{name!r} is missing or no {kind.__name__}"
    if not row["answers"] or not all(isinstance(answer, str) for answer in row["answers"]):
        return "'answers' is not a list of texts"
    classes = row.get("all_classes")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(each, str) for each in classes)):
        return "'all_classes' is not a list of texts"
    return ""


def samples(source: Source, context: int, count: int) -> Iterator[Sample]:
    """The first ``count`` rows of every file."""
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
    """F1 of words with the best answer, or 1 for the right one of several classes."""
    text, classes = outcome.text or "", sample.labels.get("classes")
    if classes:
        named = [each for each in classes if each in text]
        return float(sample.answers[0] in named) / max(1, len(named))
    return max(f1(text, answer) for answer in sample.answers)


def f1(text: str, answer: str) -> float:
    """Overlap of words, articles and punctuation aside."""
    found, wanted = _words(text), _words(answer)
    same = sum((collections.Counter(found) & collections.Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def _words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in plain.split() if word not in ("a", "an", "the")]


LONGBENCH = Task(name="longbench", summary="questions of LongBench files (--dataset)", make=samples, score=score)
