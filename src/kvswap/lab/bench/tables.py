"""Rows of a benchmark as tables: for a terminal, and in Markdown for the docs.

A page of docs names a results file between two comments, and what stands between them is made from that file::

    <!-- bench: smollm2-4k.json -->
    <!-- end -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvswap.lab.evals.tables import question_table
from kvswap.units import format_bytes, format_rate

MARK = re.compile(r"(<!-- (bench|scale|resume|quality): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]


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
    ("memory held", lambda row: format_bytes(row["kv_memory_peak_bytes"])),
    ("read a token", lambda row: format_bytes(row["read_bytes_per_token"]) if row["read_bytes_per_token"] else ""),
    ("a read", lambda row: format_bytes(row["read_size_bytes"]) if row["read_size_bytes"] else ""),
    ("disk, of its ceiling", _ceiling),
    ("waiting", lambda row: _percent(row["exposed_wait_fraction"]) if row["read_size_bytes"] else ""),
    ("x bound", lambda row: f"{row['step_over_bound']:.2f}" if row.get("step_over_bound") else ""),
    ("overhead", lambda row: _percent(row["overhead_fraction"]) if row["overhead_fraction"] else ""),
    ("reused", lambda row: _percent(row["reuse_rate"])),
)
LEFT = ("method",)


def plain_table(rows: Sequence[Row]) -> list[str]:
    """Lines of aligned columns, a line of names first."""
    cells = [[name for name, _ in COLUMNS], *([show(row) for _, show in COLUMNS] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    left = [name in LEFT for name, _ in COLUMNS]
    return [
        "  ".join(c.ljust(w) if each else c.rjust(w) for c, w, each in zip(line, widths, left, strict=True)).rstrip()
        for line in cells
    ]


def markdown_table(rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table, less the columns that are empty in all rows."""
    used = [(name, show) for name, show in COLUMNS if any(show(row) for row in rows)]
    lines = ["| " + " | ".join(name for name, _ in used) + " |"]
    lines.append("|" + "|".join("---" if name in LEFT else "--:" for name, _ in used) + "|")
    lines += ["| " + " | ".join(_cell(name, show(row)) for name, show in used) + " |" for row in rows]
    return lines


def _cell(name: str, text: str) -> str:
    return f"`{text}`" if name == "method" else text


def update_tables(page: str, results: Path) -> str:
    """A page with its tables made anew from the files in ``results``. Raises OSError, ValueError for a file amiss."""
    makers = {"bench": bench_lines, "scale": scale_lines, "resume": resume_lines, "quality": quality_lines}

    def made(match: re.Match[str]) -> str:
        content = json.loads((results / match[3]).read_text(encoding="utf-8"))
        return match[1] + "\n".join(makers[match[2]](content)) + "\n" + match[4]

    return MARK.sub(made, page)


def bench_lines(content: Row) -> list[str]:
    """The table of a benchmark, and below it what it was measured on."""
    identity, environment = content["identity"], content["environment"][-1]
    machine, test = environment["machine"], environment["read_test"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    limit = identity["config"]["kv_memory"]
    rates = f"{format_rate(test['small']['bytes_per_s'])} and {format_rate(test['large']['bytes_per_s'])}"
    about = [
        f"Model {Path(identity['model']).name}, {identity['dtype']}; memory limit of the methods on disk: {limit}; "
        f"medians of {identity['repeat']} turns of {identity['new_tokens']} steps, lowest and highest in brackets.",
        f"{machine['cpu']}, {machine['cores']} cores, {environment['threads']} threads; {environment['filesystem']}; "
        f"random reads of 16 and 64 KiB at depth 64: {rates}. {versions}.",
    ]
    return ["", *markdown_table(content["results"]), "", *about, *variant_lines(content["results"]), ""]


def variant_lines(rows: Sequence[Row]) -> list[str]:
    """One line for every configuration of its own that a method had, and where it had it if not everywhere."""
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
    """Step time by part and memory of the scale suite."""
    rows = content["results"]
    parts = list(rows[0]["parts_s"])
    names = [part.removesuffix("_s").replace("_", " ") for part in parts]
    lines = [
        "| tokens | on disk | step, ms | " + " | ".join(names) + " | read a step | reused | memory, bytes a token |"
    ]
    lines.append("|" + "--:|" * (len(parts) + 6))
    for row in rows:
        cells = [f"{row['tokens']:,}", format_bytes(row["kv_bytes"]), f"{1e3 * row['median_step_s']:.0f}"]
        cells += [f"{1e3 * row['parts_s'][part]:.1f}" for part in parts]
        cells += [format_bytes(row["read_bytes_per_step"]), _percent(row["reuse_rate"])]
        lines.append("| " + " | ".join([*cells, f"{row['memory_bytes_per_token']:,.0f}"]) + " |")
    machine = content["environment"]["machine"]
    about = f"{machine['cpu']}, {machine['cores']} cores, {content['environment']['threads']} threads."
    skipped = content["skipped_tokens"]
    return ["", *lines, "", about, *([f"Left out for lack of disk: {skipped}."] if skipped else []), ""]


def resume_lines(content: Row) -> list[str]:
    """What a session on disk is worth, and what checksums and encryption cost."""
    found, options, machine = content["summary"], content["options"], content["machine"]
    steps, ratios, shares = found["step_s"], found["step_ratio"], found["unseal_share"]
    kinds = ("", "_encrypted")
    rows = [
        ["first token after prefilling", *(f"{found[f'prefill{kind}_s']:.1f} s" for kind in kinds)],
        ["first token of the resumed session", *(f"{1e3 * found[f'resume{kind}_s']:.0f} ms" for kind in kinds)],
        [
            f"the same after {options['question']} new tokens",
            *(f"{found[f'question{kind}_s']:.2f} s" for kind in kinds),
        ],
        ["a step of decode", *(f"{1e3 * steps[kind]:.0f} ms" for kind in ("checksums", "encrypted"))],
        ["beside a step without verification", *(f"x {ratios[kind]:.3f}" for kind in ("checksums", "encrypted"))],
        ["of it spent unsealing groups", *(f"{shares[kind]:.1%}" for kind in ("checksums", "encrypted"))],
    ]
    faster = found["resume_times_faster"]
    fork = f"{1e3 * found['fork_s']:.0f} ms and {format_bytes(found['fork_disk_bytes'])} of new disk"
    about = [
        f"Model {content['model']}, {options['dtype']}, {options['tokens']:,} tokens: resuming is {faster:.0f} times "
        f"faster than prefilling. A fork takes {fork}.",
        f"{machine['cpu']}, {machine['cores']} cores, {content['threads']} threads; medians of {options['repeat']} "
        f"first tokens and forks, and of {options['turns']} turns of {options['steps']} steps of each kind.",
    ]
    lines = ["| | with checksums | encrypted |", "|---|--:|--:|", *(f"| {' | '.join(row)} |" for row in rows)]
    return ["", *lines, "", *about, ""]


def quality_lines(content: Row) -> list[str]:
    """Scores of the question tasks, and below them what they were made with."""
    identity, rows = content["identity"], content["results"]
    limits = ", ".join(dict.fromkeys(row["kv_memory"] for row in rows if row["kv_memory"]))
    about = (
        f"Model {Path(identity['model']).name}, {identity['dtype']}; memory limit of the methods on disk: {limits}; "
        f"{identity['config']['select_tokens']} tokens selected; seed {identity['seed']}. "
        f"{content['machine']['system']}, torch {content['machine']['torch']}, kvswap {identity['kvswap_version']}."
    )
    return ["", *question_table(rows), "", about, ""]
