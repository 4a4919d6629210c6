"""Plot a profile's read rates with matplotlib (extra ``plots``)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from kvswap.disk.folders import user_path
from kvswap.errors import ConfigError
from kvswap.tuning.cost import DiskCosts
from kvswap.units import KIB

KINDS = (".png", ".svg", ".pdf")


def check_plot(path: str | Path) -> Path:
    """Return the absolute path of a plot. Raises ConfigError for an unknown kind of file or a missing matplotlib."""
    target = user_path(path).absolute()
    if target.suffix.lower() not in KINDS:
        raise ConfigError(
            f"--plot {target.name}: unknown kind of picture", hint=f"end the file name with one of {', '.join(KINDS)}"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed", hint="run: pip install 'kvswap[plots]'")
    return target


def draw_reads(disks: Sequence[DiskCosts], path: Path) -> None:
    """Plot read rate over read size with one line per depth, and mark the smallest efficient read size.

    Raises ConfigError when the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * len(disks), 4.0), layout="constrained")
    axes = figure.subplots(1, len(disks), squeeze=False, sharey=True)[0]
    for each, disk in zip(axes, disks, strict=True):
        for depth in sorted({point.depth for point in disk.bursts}):
            line = sorted((point.read_bytes, point.bytes_per_s / 1e6) for point in disk.bursts if point.depth == depth)
            each.plot([size for size, _ in line], [rate for _, rate in line], marker="o", label=f"depth {depth}")
        efficient = disk.read_size_bytes()
        each.axvline(efficient, color="black", linestyle="--", label=f"efficient from {efficient // KIB} KiB")
        each.set(xscale="log", yscale="log", xlabel="read size", ylabel="MB/s", title=f"random reads, {disk.backend}")
        each.xaxis.set_major_formatter(lambda size, _: f"{size / KIB:g} KiB")
        each.legend(fontsize="small")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--plot {path}: cannot be written: {error}", hint="give a .png, .svg or .pdf file in a writable folder"
        ) from error
