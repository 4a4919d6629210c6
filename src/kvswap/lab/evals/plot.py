"""A picture of a results file: heat maps of the needle grid where there is one, KL and retention by task otherwise."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvswap.errors import ConfigError
from kvswap.lab.evals.results import Record

KINDS = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> Path:
    """Raise ConfigError where ``path`` is no picture that can be made, or matplotlib is missing."""
    if path.suffix.lower() not in KINDS:
        raise ConfigError(f"--plot {path.name}: unknown kind of picture", hint=f"end it with one of {', '.join(KINDS)}")
    try:
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib", hint="run: pip install 'kvswap[plots]'") from error
    return path


def plot(results: Path, target: Path) -> None:
    """Draw the results file ``results`` into ``target``."""
    from matplotlib.figure import Figure

    content = json.loads(results.read_text(encoding="utf-8"))
    cells = grids(content["samples"])
    figure = Figure(figsize=(4.2 * max(1, len(cells)), 3.4) if cells else (8, 4), layout="constrained")
    if cells:
        _heat_maps(figure, cells)
    else:
        _bars(figure, content["results"])
    figure.suptitle(Path(content["identity"]["model"]).name)
    figure.savefig(target, dpi=150)


def grids(samples: Sequence[Record]) -> dict[str, dict[tuple[float, int], float]]:
    """Mean score by (depth, context) for every variant of the task ``needle``."""
    found: dict[str, dict[tuple[float, int], list[float]]] = {}
    for each in samples:
        if each["task"] == "needle":
            cell = (each["depth"], each["context"])
            found.setdefault(_label(each), {}).setdefault(cell, []).append(each["score"])
    return {name: {cell: statistics.fmean(s) for cell, s in cells.items()} for name, cells in found.items()}


def _label(each: Record) -> str:
    parts = [each["method"], each["setting"] or "", f"@ {each['kv_memory']}" if each["kv_memory"] else ""]
    return " ".join(part for part in parts if part)


def _heat_maps(figure: Any, grids: dict[str, dict[tuple[float, int], float]]) -> None:
    for axes, (name, cells) in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids.items(), strict=True):
        depths, contexts = sorted({depth for depth, _ in cells}), sorted({context for _, context in cells})
        rows = [[cells.get((depth, context), float("nan")) for context in contexts] for depth in depths]
        image = axes.imshow(rows, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_title(name)
        axes.set_xlabel("context, tokens")
        axes.set_ylabel("depth of the needle")
        axes.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    figure.colorbar(image, ax=figure.axes, label="score")


def _bars(figure: Any, results: Sequence[Record]) -> None:
    rows = [row for row in results if row["method"] != "full"]
    names = [f"{row['task']} {row['context']:,}\n{_label(row)}" for row in rows]
    for axes, key, label in zip(figure.subplots(1, 2), ("kl", "retention"), ("KL, nats", "score / full"), strict=True):
        axes.barh(names, [row[key] or 0 for row in rows])
        axes.set_xlabel(label)
        axes.invert_yaxis()
