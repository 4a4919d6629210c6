"""A results file of ``kvswap eval`` as a table in Markdown: a line a task, a column a method and setting.

Cells hold the mean score, in brackets the paired difference to full attention in points with its standard error, and
KL over the right answer.
Lines of means weigh tasks alike; their errors take tasks as independent of each other.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from kvswap.lab.evals.results import Record

SEVERAL = ("ruler-mk1", "ruler-mq", "ruler-mv")
"""Tasks with several facts."""
TEXT = ("agreement", "perplexity")
GRID = "needle"

Key = tuple[str, str | None]


def question_table(results: Sequence[Record]) -> list[str]:
    """Lines of a table of the question tasks, one a context and task, then means and retention."""
    rows = [row for row in results if row["task"] not in TEXT]
    keys = list(dict.fromkeys(_key(row) for row in rows if row["method"] != "full"))
    lines = ["| context | task | n (texts) | full | " + " | ".join(map(_title, keys)) + " |"]
    lines.append("|--:|---|--:|--:|" + "--:|" * len(keys))
    for context in dict.fromkeys(row["context"] for row in rows):
        here = {(row["task"], _key(row)): row for row in rows if row["context"] == context}
        tasks = list(dict.fromkeys(task for task, _ in here))
        for task in tasks:
            full, found = here[task, ("full", None)], [here.get((task, key)) for key in keys]
            cells = [f"{context:,}", f"`{task}`", f"{full['n']} ({full['texts']})", f"{full['score']:.3f}"]
            lines.append(_line([*cells, *map(_cell, found)]))
        graded = [task for task in tasks if task != GRID and here[task, ("full", None)]["score"] > 0]
        several = [task for task in graded if task in SEVERAL]
        for name, some in (("several facts", several), ("all but the needle grid", graded)):
            if len(some) > 1:
                lines.append(_means(name, context, [[here.get((task, key)) for task in some] for key in keys]))
    return lines


def _means(name: str, context: int, columns: Sequence[Sequence[Record | None]]) -> str:
    cells, full_cell = [], ""
    for column in columns:
        rows = [row for row in column if row is not None]
        if len(rows) < len(column):
            cells.append("")
            continue
        full, own = (statistics.fmean(row[key] for row in rows) for key in ("full_score", "score"))
        errors = [row["difference_stderr"] for row in rows]
        error = "" if None in errors else f" ± {100 * sum(e * e for e in errors) ** 0.5 / len(errors) / full:.1f}"
        cells.append(f"**{own / full:.1%}**{error}")
        full_cell = f"{full:.3f}"
    return _line([f"{context:,}", f"{name}: score of full", "", full_cell, *cells])


def _cell(row: Record | None) -> str:
    if row is None:
        return ""
    error = row["difference_stderr"]
    points = f"{100 * row['difference']:+.1f}{'' if error is None else f' ± {100 * error:.1f}'}"
    return f"{row['score']:.3f} ({points}), {row['kl']:.3f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _key(row: Record) -> Key:
    return row["method"], row["setting"]


def _title(key: Key) -> str:
    return " ".join(part for part in key if part)
