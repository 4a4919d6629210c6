"""A picture of a benchmark: decode speed and agreement of each method. Needs matplotlib, the extra ``plots``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_rows(rows: Sequence[dict[str, Any]], target: Path, title: str) -> None:
    """Bars of decode speed with lowest and highest turn, and of KL, for every batch and context."""
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
        divergence.set_xlabel("KL(full ‖ method), nats a token", fontsize=8)
        divergence.set_yticklabels([])
        for each in (speed, divergence):
            each.invert_yaxis()
            each.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(target, dpi=150)
