"""Format results as tables: aligned text for a terminal, and Markdown for the docs.

A page of docs names a results file between two comments. ``update_tables`` replaces what stands between them::

    <!-- bench: smollm2-4k.json -->
    <!-- end -->

The word before the colon says which kind of results the file holds: ``bench``, ``scale``, ``resume`` or ``quality``.
``kvswap bench`` and ``benchmarks/tables.py`` call this module. Values in, text out.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvswap.units import format_bytes, format_rate

MARK = re.compile(r"(<!-- (bench|scale|resume|quality): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
SEVERAL_FACTS = ("ruler-mk1", "ruler-mq", "ruler-mv", "facts-one", "facts-all", "facts-values")
"""Tasks whose text hides several facts."""
TEXT_TASKS = ("agreement", "perplexity")
"""Tasks without questions."""
NEEDLE_GRID = "needle"

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]
VariantKey = tuple[str, str | None]


def _rate(row: Row) -> str:
    low, high = row["spread"]["decode_tokens_per_s"]
    return f"{row['decode_tokens_per_s']:.2f} ({low:.2f} to {high:.2f})"


def _of_full(row: Row) -> str:
    return "" if row["decode_speed_of_full"] is None else f"{row['decode_speed_of_full']:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _ceiling(row: Row) -> str:
    if not row["read_size_bytes"]:
        return ""
    return f"{format_rate(row['read_bytes_per_s'])} of {format_rate(row['ceiling_bytes_per_s'])}"


COLUMNS: tuple[Column, ...] = (
    ("context", lambda row: f"{row['context']:,}"),
    ("batch", lambda row: str(row["batch"])),
    ("method", lambda row: row["method"]),
    ("tokens/s", _rate),
    ("x full", _of_full),
    ("p50 ms", lambda row: f"{row['itl_ms']['p50']:.0f}"),
    ("p99 ms", lambda row: f"{row['itl_ms']['p99']:.0f}"),
    ("first token", lambda row: "" if row["ttft_s"] is None else f"{row['ttft_s']:.1f} s"),
    ("KL", lambda row: "" if row["kl"] is None else f"{row['kl']:.4f}"),
    ("top-1", lambda row: _percent(row["top1"])),
    ("KV memory", lambda row: format_bytes(row["kv_memory_peak_bytes"])),
    ("read per token", lambda row: format_bytes(row["read_bytes_per_token"]) if row["read_bytes_per_token"] else ""),
    ("read size", lambda row: format_bytes(row["read_size_bytes"]) if row["read_size_bytes"] else ""),
    ("disk rate of ceiling", _ceiling),
    ("I/O wait", lambda row: _percent(row["exposed_wait_fraction"]) if row["read_size_bytes"] else ""),
    ("x bound", lambda row: f"{row['step_over_bound']:.2f}" if row.get("step_over_bound") else ""),
    ("overhead", lambda row: _percent(row["overhead_fraction"]) if row["overhead_fraction"] else ""),
    ("reused", lambda row: _percent(row["reuse_rate"])),
)
LEFT = ("method",)


def plain_table(rows: Sequence[Row], columns: Sequence[Column] = COLUMNS, left: Sequence[str] = LEFT) -> list[str]:
    """Format rows as lines of aligned columns, headings first; columns in ``left`` are aligned to the left."""
    cells = [[name for name, _ in columns], *([show(row) for _, show in columns] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(columns))]
    to_left = [name in left for name, _ in columns]
    return [
        "  ".join(c.ljust(w) if each else c.rjust(w) for c, w, each in zip(line, widths, to_left, strict=True)).rstrip()
        for line in cells
    ]


def markdown_table(
    rows: Sequence[Row], columns: Sequence[Column] = COLUMNS, left: Sequence[str] = LEFT, code: Sequence[str] = LEFT
) -> list[str]:
    """Format rows as lines of a Markdown table, without the columns that are empty in all rows.

    Columns in ``left`` are aligned to the left; cells of those in ``code`` are set as code.
    """
    used = [(name, show) for name, show in columns if any(show(row) for row in rows)]
    lines = [_markdown([name for name, _ in used])]
    lines.append("|" + "|".join("---" if name in left else "--:" for name, _ in used) + "|")
    for row in rows:
        lines.append(_markdown([f"`{show(row)}`" if name in code else show(row) for name, show in used]))
    return lines


def update_tables(page: str, results: Path) -> str:
    """Return a page with its tables made again from the files in ``results``.

    Raises OSError for a file that cannot be read, ValueError and KeyError for one with wrong content.
    """
    formats = {"bench": bench_lines, "scale": scale_lines, "resume": resume_lines, "quality": quality_lines}

    def updated(match: re.Match[str]) -> str:
        content = json.loads((results / match[3]).read_text(encoding="utf-8"))
        return match[1] + "\n".join(formats[match[2]](content)) + "\n" + match[4]

    return MARK.sub(updated, page)


def _model(identity: Row) -> str:
    """Which model a results file is about, with its dtype, and its weights where these were asked for."""
    weights = identity.get("weights", "auto")
    kind = "" if weights == "auto" else f", weights {weights}"
    return f"Model {Path(identity['model']).name}, {identity['dtype']}{kind}"


def bench_lines(content: Row) -> list[str]:
    """Format a results file of ``kvswap bench``: the table, then the model, machine and disk."""
    identity, environment = content["identity"], content["environment"][-1]
    machine, test = environment["machine"], environment["read_test"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    limit = identity["config"]["kv_memory"]
    rates = f"{format_rate(test['small']['bytes_per_s'])} and {format_rate(test['large']['bytes_per_s'])}"
    about = [
        f"{_model(identity)}; memory limit of the methods on disk: {limit}; "
        f"medians of {identity['repeat']} turns of {identity['new_tokens']} steps, lowest and highest in brackets.",
        f"{machine['cpu']}, {machine['cores']} cores, {environment['threads']} threads; {environment['filesystem']}; "
        f"random reads of 16 and 64 KiB at depth 64: {rates}. {versions}.",
    ]
    return ["", *markdown_table(content["results"]), "", *about, *variant_lines(content["results"]), ""]


def variant_lines(rows: Sequence[Row]) -> list[str]:
    """Format one line for each method with a configuration of its own.

    Where the configuration differs between contexts or batches, each line says where it applies.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row.get("config") is not None:
            settings = ", ".join(f"{key} {_setting(value)}" for key, value in row["config"].items()) or "all defaults"
            places = found.setdefault(row["method"], {}).setdefault(settings, [])
            places.append(f"{row['batch']} x {row['context']:,} tokens")
    return [
        f"`{method}`{' at ' + ' and '.join(places) if len(each) > 1 else ''}: {settings}."
        for method, each in found.items()
        for settings, places in each.items()
    ]


def _setting(value: Any) -> str:
    return f"{min(value)} to {max(value)}" if isinstance(value, list) else str(value)


def scale_lines(content: Row) -> list[str]:
    """Format a results file of ``benchmarks/scale.py``: step time by part, and memory."""
    rows = content["results"]
    parts = list(rows[0]["parts_s"])
    names = [part.removesuffix("_s").replace("_", " ") for part in parts]
    headings = ["tokens", "on disk", "step, ms", *names, "read per step", "reused", "memory, bytes per token"]
    lines = [_markdown(headings), "|" + "--:|" * len(headings)]
    for row in rows:
        cells = [f"{row['tokens']:,}", format_bytes(row["kv_bytes"]), f"{1e3 * row['median_step_s']:.0f}"]
        cells += [f"{1e3 * row['parts_s'][part]:.1f}" for part in parts]
        cells += [format_bytes(row["read_bytes_per_step"]), _percent(row["reuse_rate"])]
        lines.append(_markdown([*cells, f"{row['memory_bytes_per_token']:,.0f}"]))
    machine = content["environment"]["machine"]
    about = f"{machine['cpu']}, {machine['cores']} cores, {content['environment']['threads']} threads."
    skipped = content["skipped_tokens"]
    return [
        "",
        *lines,
        "",
        about,
        *([f"Not measured, because the disk was too small: {skipped}."] if skipped else []),
        "",
    ]


def resume_lines(content: Row) -> list[str]:
    """Format a results file of ``benchmarks/resume.py``: resuming, forks, checksums and encryption."""
    found, options, machine = content["summary"], content["options"], content["machine"]
    steps, ratios, shares = found["step_s"], found["step_ratio"], found["unseal_share"]
    kinds = ("", "_encrypted")
    rows = [
        ["first token after prefill", *(f"{found[f'prefill{kind}_s']:.1f} s" for kind in kinds)],
        ["first token of the resumed session", *(f"{1e3 * found[f'resume{kind}_s']:.0f} ms" for kind in kinds)],
        [
            f"first token after {options['question']} new tokens in the resumed session",
            *(f"{found[f'question{kind}_s']:.2f} s" for kind in kinds),
        ],
        ["decode step", *(f"{1e3 * steps[kind]:.0f} ms" for kind in ("checksums", "encrypted"))],
        ["relative to a step without verification", *(f"x {ratios[kind]:.3f}" for kind in ("checksums", "encrypted"))],
        ["share of the step for verifying groups", *(f"{shares[kind]:.1%}" for kind in ("checksums", "encrypted"))],
    ]
    faster = found["resume_times_faster"]
    fork = f"{1e3 * found['fork_s']:.0f} ms and {format_bytes(found['fork_disk_bytes'])} of new disk space"
    about = [
        f"Model {content['model']}, {options['dtype']}, {options['tokens']:,} tokens. Resuming is {faster:.0f} times "
        f"faster than prefill. A fork takes {fork}.",
        f"{machine['cpu']}, {machine['cores']} cores, {content['threads']} threads; medians of {options['repeat']} "
        f"first tokens and forks, and of {options['turns']} turns of {options['steps']} steps of each kind.",
    ]
    lines = ["| | with checksums | encrypted |", "|---|--:|--:|", *(_markdown(row) for row in rows)]
    return ["", *lines, "", *about, ""]


def quality_lines(content: Row) -> list[str]:
    """Format a results file of ``kvswap eval``: the question tasks, then the model and settings."""
    identity, rows = content["identity"], content["results"]
    limits = ", ".join(dict.fromkeys(row["kv_memory"] for row in rows if row["kv_memory"]))
    count = identity["config"]["select_tokens"]
    selected = "an eighth of the tokens" if count == "auto" else f"{count} tokens"
    about = (
        f"{_model(identity)}; memory limit of the methods on disk: {limits}; "
        f"{selected} selected; seed {identity['seed']}. Text: {_text(identity)}. "
        f"{content['machine']['system']}, torch {content['machine']['torch']}, kvswap {identity['kvswap_version']}."
    )
    return ["", *question_table(rows), "", about, ""]


def _text(identity: Row) -> str:
    """What text results were measured on."""
    documents = ", ".join(identity.get("documents", []))
    return f"{documents} (of the user's)" if documents else "Python documentation"


def question_table(results: Sequence[Row]) -> list[str]:
    """Format the question tasks of an evaluation: one line per context and task, one column per method and setting.

    A cell holds the mean score; in brackets the paired difference to full attention in points with its standard error;
    then the KL over the right answer. Lines with means give all tasks the same weight, and their errors treat the tasks
    as independent.
    """
    rows = [row for row in results if row["task"] not in TEXT_TASKS]
    keys = list(dict.fromkeys(_variant(row) for row in rows if row["method"] != "full"))
    titles = [" ".join(part for part in key if part) for key in keys]
    lines = [_markdown(["context", "task", "n (texts)", "full", *titles])]
    lines.append("|--:|---|--:|--:|" + "--:|" * len(keys))
    for context in dict.fromkeys(row["context"] for row in rows):
        here = {(row["task"], _variant(row)): row for row in rows if row["context"] == context}
        tasks = list(dict.fromkeys(task for task, _ in here))
        for task in tasks:
            full, found = here[task, ("full", None)], [here.get((task, key)) for key in keys]
            cells = [f"{context:,}", f"`{task}`", f"{full['n']} ({full['texts']})", f"{full['score']:.3f}"]
            lines.append(_markdown([*cells, *map(_score, found)]))
        graded = [task for task in tasks if task != NEEDLE_GRID and here[task, ("full", None)]["score"] > 0]
        several = [task for task in graded if task in SEVERAL_FACTS]
        for name, some in (("several facts", several), ("all but the needle grid", graded)):
            if len(some) > 1:
                lines.append(_means(name, context, [[here.get((task, key)) for task in some] for key in keys]))
    return lines


def _variant(row: Row) -> VariantKey:
    return row["method"], row["setting"]


def _means(name: str, context: int, columns: Sequence[Sequence[Row | None]]) -> str:
    """One line with the mean score of several tasks as a share of full attention's, by method and setting."""
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
    return _markdown([f"{context:,}", f"{name}: score of full", "", full_cell, *cells])


def _score(row: Row | None) -> str:
    if row is None:
        return ""
    error = row["difference_stderr"]
    points = f"{100 * row['difference']:+.1f}{'' if error is None else f' ± {100 * error:.1f}'}"
    return f"{row['score']:.3f} ({points}), {row['kl']:.3f}"


def _markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
