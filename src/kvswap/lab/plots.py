"""Plot results of ``kvswap bench``, ``kvswap eval`` and ``benchmarks/scale.py``. Needs matplotlib (extra ``plots``).

``kvswap.tuning.plots.check_plot`` checks the file name and matplotlib before a run starts.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvswap.lab.evals.results import Record


def plot_bench(rows: Sequence[dict[str, Any]], target: Path, title: str) -> None:
    """Plot bars of decode speed, with the slowest and fastest turn, and of KL, for every context and batch."""
    from matplotlib.figure import Figure

    places = list(dict.fromkeys((row["context"], row["batch"]) for row in rows))
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(rows) + 0.5 * len(places)), layout="constrained")
    heights = [sum((row["context"], row["batch"]) == place for row in rows) for place in places]
    axes = figure.subplots(len(places), 2, squeeze=False, height_ratios=heights)
    for (speed, divergence), place in zip(axes, places, strict=True):
        own = [row for row in rows if (row["context"], row["batch"]) == place]
        names = [row["method"] for row in own]
        colors = ["tab:orange" if name.partition("@")[0] == "kvswap" else "tab:gray" for name in names]
        rates = [row["decode_tokens_per_s"] for row in own]
        spread = [row["spread"]["decode_tokens_per_s"] for row in own]
        errors = [[rate - low for rate, (low, _) in zip(rates, spread, strict=True)]]
        errors.append([high - rate for rate, (_, high) in zip(rates, spread, strict=True)])
        speed.barh(names, rates, xerr=errors, color=colors)
        speed.set_title(f"{place[0]:,} tokens, batch {place[1]}", fontsize=9, loc="left")
        speed.set_xlabel("decode, tokens/s", fontsize=8)
        divergence.barh(names, [row["kl"] or 0 for row in own], color=colors)
        divergence.set_xlabel("KL(full ‖ method), nats per token", fontsize=8)
        divergence.set_yticklabels([])
        for each in (speed, divergence):
            each.invert_yaxis()
            each.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(target, dpi=150)


def plot_eval(results: Path, target: Path) -> None:
    """Plot a results file of ``kvswap eval``: heat maps of the needle grid if it has one, else KL and retention."""
    from matplotlib.figure import Figure

    content = json.loads(results.read_text(encoding="utf-8"))
    cells = needle_grids(content["samples"])
    figure = Figure(figsize=(4.2 * max(1, len(cells)), 3.4) if cells else (8, 4), layout="constrained")
    if cells:
        _heat_maps(figure, cells)
    else:
        _bars(figure, content["results"])
    figure.suptitle(Path(content["identity"]["model"]).name)
    figure.savefig(target, dpi=150)


def plot_scale(rows: list[dict[str, Any]], target: Path) -> None:
    """Plot step time by part and memory per token over the length of the context."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    steps, memory = figure.subplots(1, 2)
    names = [f"{row['tokens'] >> 10}K" for row in rows]
    for axes, values, factor in (
        (steps, [row["parts_s"] for row in rows], 1e3),
        (memory, [{k: v / row["tokens"] for k, v in row["memory_parts"].items()} for row in rows], 1.0),
    ):
        bottom = [0.0] * len(rows)
        for part in values[0]:
            heights = [factor * row[part] for row in values]
            axes.bar(names, heights, bottom=bottom, label=part.removesuffix("_s").replace("_", " "))
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axes.set_xlabel("context, tokens")
        axes.legend(fontsize=7)
    steps.set_ylabel("decode step without the model, ms")
    memory.set_ylabel("memory, bytes per token")
    figure.savefig(target, dpi=150)


def needle_grids(samples: Sequence[Record]) -> dict[str, dict[tuple[float, int], float]]:
    """Return the mean scores of tasks with depths, by task and variant, and by (depth, context in tokens)."""
    found: dict[str, dict[tuple[float, int], list[float]]] = {}
    for each in samples:
        if "depth" in each:
            cell = (each["depth"], each["context"])
            found.setdefault(f"{each['task']}, {_label(each)}", {}).setdefault(cell, []).append(each["score"])
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
