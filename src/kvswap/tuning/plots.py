"""Pictures of a profile, with matplotlib (extra ``plots``)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from kvswap.errors import ConfigError
from kvswap.tuning.cost import DiskCosts
from kvswap.units import KIB


def check_plots() -> None:
    """Raise ConfigError where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot: matplotlib is not installed", hint="run: pip install 'kvswap[plots]'")


def draw_reads(disks: Sequence[DiskCosts], path: Path) -> None:
    """Draw read rate over read size, one line a depth, with the read size from which on the disk is well used."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * len(disks), 4.0), layout="constrained")
    axes = figure.subplots(1, len(disks), squeeze=False, sharey=True)[0]
    for each, disk in zip(axes, disks, strict=True):
        for depth in sorted({point.depth for point in disk.bursts}):
            line = sorted((point.read_bytes, point.bytes_per_s / 1e6) for point in disk.bursts if point.depth == depth)
            each.plot([size for size, _ in line], [rate for _, rate in line], marker="o", label=f"{depth} at once")
        chosen = disk.read_size_bytes()
        each.axvline(chosen, color="black", linestyle="--", label=f"well used from {chosen // KIB} KiB")
        each.set(
            xscale="log", yscale="log", xlabel="bytes of a read", ylabel="MB/s", title=f"random reads, {disk.backend}"
        )
        each.xaxis.set_major_formatter(lambda size, _: f"{size / KIB:g} KiB")
        each.legend(fontsize="small")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--plot {path}: {error}", hint="give a .png, .svg or .pdf file in a folder of yours"
        ) from error
