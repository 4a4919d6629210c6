"""Make the tables in README.md and docs anew from benchmarks/results; ``make tables``.

A page names results files between two comments, and what stands between them is made from these files::

    <!-- deciding: bench-smollm2-8k.json bench-qwen05-32k.json -->
    <!-- end -->

``deciding`` shows kvswap in the three numbers that decide whether to use it. ``single`` shows only its rows with one
sequence, for runs on the plain disk. ``beside`` shows every method of one file in the same numbers. ``peers`` shows
other programs beside kvswap, ``real`` the same at the size of Llama-3.1-8B. The full tables (``bench``, ``scale``,
``resume``, ``quality``) are those of ``kvswap.lab.tables``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvswap.lab.peers.report import markdown_lines
from kvswap.lab.tables import MARK, update_tables
from kvswap.units import format_bytes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHORT_MARK = re.compile(r"(<!-- (deciding|single|beside|peers|real): ([^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
MODELS = {"smollm2": "SmolLM2-135M", "smollm2-135m": "SmolLM2-135M", "qwen05": "Qwen2.5-Coder-0.5B"}

Row = dict[str, Any]


def pages() -> list[Path]:
    """The pages that have tables made from results."""
    every = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = {page: page.read_text(encoding="utf-8") for page in every}
    return [page for page, text in texts.items() if MARK.search(text) or SHORT_MARK.search(text)]


def results_of(page: str) -> list[str]:
    """Names of the results files that a page shows."""
    short = [name for _, _, names, _ in SHORT_MARK.findall(page) for name in names.split()]
    return [*(name for _, _, name, _ in MARK.findall(page)), *short]


def update_page(page: str, results: Path) -> str:
    """A page with all its tables made anew. Raises OSError or ValueError for a results file that is amiss."""

    def made(match: re.Match[str]) -> str:
        files = [json.loads((results / name).read_text(encoding="utf-8")) for name in match[3].split()]
        if match[2] == "peers":
            lines = markdown_lines(files[0])[1:-1]
        elif match[2] == "real":
            lines = real_size_lines(files[0])
        elif match[2] == "beside":
            lines = beside_lines(files[0])
        else:
            lines = deciding_lines(files, single=match[2] == "single")
        return match[1] + "\n".join(["", *lines, ""]) + "\n" + match[4]

    return SHORT_MARK.sub(made, update_tables(page, results))


def deciding_lines(files: Sequence[Row], *, single: bool) -> list[str]:
    """Memory, speed and agreement of kvswap's defaults, one row a run; shorter contexts come first."""
    found: list[tuple[tuple[int, int, str], list[str]]] = []
    for content in files:
        model = MODELS[Path(content["identity"]["model"]).name]
        disk = content["identity"]["label"] or "plain"
        for row in content["results"]:
            if row["method"] != "kvswap" or (single and row["batch"] > 1):
                continue
            place = [] if single else [str(row["batch"]), disk]
            cells = [model, f"{row['context']:,}", *place, *_memory(row), *_numbers(row)]
            found.append(((row["batch"], row["context"], model), cells))
    names = ["model", "context", *([] if single else ["sequences", "disk"])]
    names += ["full 16-bit cache", "kvswap's memory", "speed, full attention = 1", "same next token"]
    return _table(names, [cells for _, cells in sorted(found, key=lambda each: each[0])])


def beside_lines(content: Row) -> list[str]:
    """Every method of one file in the numbers that decide."""
    rows = content["results"]
    several = len({(row["context"], row["batch"]) for row in rows}) > 1
    cells = []
    for row in rows:
        place = [f"{row['context']:,}", str(row["batch"])] if several else []
        kl = "" if row["kl"] is None else f"{row['kl']:.4f}"
        held = format_bytes(row["kv_memory_peak_bytes"])
        cells.append([*place, f"`{row['method']}`", held, *_numbers(row), kl])
    names = ["context", "sequences"] if several else []
    return _table([*names, "method", "memory", "speed, full attention = 1", "same next token", "KL"], cells)


def real_size_lines(content: Row) -> list[str]:
    """Results of ``real_size.py``: without a memory limit first, then by context."""
    cells, versions = [], dict[str, str]()
    rows = sorted(content["results"], key=lambda row: (row["memory_limit_bytes"] or 0, row["context"], row["program"]))
    for row in rows:
        versions |= row.get("versions", {})
        limit = format_bytes(row["memory_limit_bytes"]) if row["memory_limit_bytes"] else "none"
        rate = f"{row['decode_tokens_per_s']:.2f}" if "decode_tokens_per_s" in row else row["outcome"]
        first = f"{row['resume_s'] + row['first_step_s']:.1f} s" if row.get("first_step_s") else ""
        held = [format_bytes(row[key]) if key in row else "" for key in ("anonymous_bytes", "mapped_bytes")]
        cells.append([limit, f"{row['context']:,}", row["program"], rate, *held, first])
    names = ["memory limit", "context", "program", "decode, tokens/s", "anonymous memory", "mapped memory"]
    identity, machine = content["identity"], content["environment"]["machine"]
    about = (
        f"{identity['threads']} threads for each program; medians of all steps. {machine['cpu']}, {machine['cores']} "
        f"cores. {', '.join(f'{name} {version}' for name, version in versions.items())}."
    )
    return [*_table([*names, "first token"], cells), "", about]


def _memory(row: Row) -> list[str]:
    full_bytes, held_bytes = row["kv_full_bytes"], row["kv_memory_peak_bytes"]
    return [format_bytes(full_bytes), f"{format_bytes(held_bytes)} (1/{full_bytes / held_bytes:.1f})"]


def _numbers(row: Row) -> list[str]:
    return [f"{row['decode_speed_of_full']:.2f}", "" if row["top1"] is None else f"{row['top1']:.0%}"]


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    left = ("model", "disk", "method", "program")
    marks = "|".join("---" if name in left else "--:" for name in names)
    return ["| " + " | ".join(names) + " |", f"|{marks}|", *("| " + " | ".join(row) + " |" for row in rows)]


def main() -> None:
    """Rewrite the pages."""
    for page in pages():
        page.write_text(update_page(page.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")


if __name__ == "__main__":
    main()
