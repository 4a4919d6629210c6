"""Show results of ``kvswap bench --peers``: a table for a terminal, one for the docs, and a plot over the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvswap.lab.tables import markdown_table, plain_table
from kvswap.units import format_bytes

Row = dict[str, Any]
OWN = "kvswap"

COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("context", lambda row: f"{row['context']:,}"),
    ("program", lambda row: row["program"]),
    ("decode, tokens/s", lambda row: f"{row['decode_tokens_per_s']:.1f}"),
    ("kvswap is faster by", lambda row: "" if row["program"] == OWN else f"{row['decode_ratio']:.2f} x"),
    ("prefill, tokens/s", lambda row: f"{row['prefill_tokens_per_s']:.0f}"),
    ("anonymous memory", lambda row: format_bytes(row["anonymous_bytes"])),
    ("mapped memory", lambda row: format_bytes(row["mapped_bytes"])),
    ("load", lambda row: f"{row['load_s']:.1f} s"),
    ("same next token", lambda row: "" if row["program"] == OWN else f"{row['same_next_token']:.0%}"),
)
LEFT = ("program",)


def table(rows: Sequence[Row]) -> list[str]:
    """Format rows as lines of aligned columns, headings first."""
    return plain_table(rows, COLUMNS, LEFT)


def markdown_lines(content: Row) -> list[str]:
    """Format a results file as a Markdown table, then the model and machine."""
    lines = markdown_table(content["results"], COLUMNS, LEFT, code=())
    identity, machine = content["identity"], content["environment"]["machine"]
    versions: dict[str, str] = {}
    for row in content["results"]:
        versions |= row["versions"]
    turns = f"medians of {identity['repeat']} turns" if identity["repeat"] > 1 else "one turn"
    about = (
        f"Model file {identity['model']}; {identity['threads']} threads for each program; {turns} of "
        f"{identity['new_tokens']} steps. {machine['cpu']}, {machine['cores']} cores. "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}."
    )
    return ["", *lines, "", about, ""]


def plot(rows: Sequence[Row], target: Path, title: str) -> None:
    """Plot decode and prefill speed of every program over the context. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    both = figure.subplots(1, 2)
    for axes, label in zip(both, ("decode", "prefill"), strict=True):
        key = f"{label}_tokens_per_s"
        for name in dict.fromkeys(row["program"] for row in rows):
            own = sorted((row["context"], row[key]) for row in rows if row["program"] == name)
            color = "tab:orange" if name == OWN else None
            axes.plot([each for each, _ in own], [rate for _, rate in own], marker="o", label=name, color=color)
        axes.set_xscale("log", base=2)
        contexts = sorted({row["context"] for row in rows})
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts], fontsize=7)
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("context, tokens")
        axes.set_ylabel(f"{label}, tokens/s")
        axes.legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(target, dpi=150)
