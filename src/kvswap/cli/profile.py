"""``kvswap profile``: measure the disk and a model, and show the costs as a table, a file and a plot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kvswap.cli.options import with_weights

if TYPE_CHECKING:
    from rich.console import Console

    from kvswap.tuning.cost import DiskCosts
    from kvswap.tuning.profile import Profile


@click.command()
@click.option(
    "--model",
    metavar="MODEL",
    help="Also time this model: a local directory, a .gguf file, a hub id, or smollm2-135m.  [default: the disk alone]",
)
@click.option("--kv-dir", metavar="DIR", help="Folder for KV files to measure.  [default: the user's cache folder]")
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    help="File to write the profile to.  [default: with a model, in the cache folder, where kvswap tune finds it]",
)
@click.option(
    "--plot",
    "plot_file",
    metavar="FILE",
    help="Also plot read rate over read size as .png, .svg or .pdf (needs kvswap[plots]).",
)
@with_weights
def profile(
    model: str | None, kv_dir: str | None, json_file: str | None, plot_file: str | None, weights: str, no_mmap: bool
) -> None:
    """Measure how fast this disk reads and, with --model, what a decode step of the model costs.

    This takes about 25 s for the disk alone, and less than 90 s with a small model. No test file remains on the disk.

    \b
    Examples:
      kvswap profile --kv-dir /data/kv --plot disk.png
      kvswap profile --model smollm2-135m --json profile.json
    """
    from rich.console import Console

    from kvswap.cli.display import Display
    from kvswap.cli.files import check_writable
    from kvswap.errors import ConfigError
    from kvswap.tuning.profile import cached_path, take_profile

    if model is None and (weights != "auto" or no_mmap):
        raise ConfigError("--weights or --no-mmap without --model", hint="give the model, or leave them out")
    for option, path in (("--json", json_file), ("--plot", plot_file)):
        if path is not None:
            check_writable(option, path)
    picture = None
    if plot_file is not None:
        from kvswap.tuning.plots import check_plot

        picture = check_plot(plot_file)
    display = Display()
    loaded = None
    if model is not None:
        from kvswap.cli.loading import load_weights

        loaded = load_weights(model, display, weights=weights, no_mmap=no_mmap)
    try:
        found = take_profile(kv_dir, loaded, on_progress=display.progress)
    finally:
        display.finish()
    console = Console(highlight=False)
    show(console, found)
    target = json_file or (str(cached_path(found.model.fingerprint, kv_dir)) if found.model else None)
    if target is not None:
        found.save(target)
        console.print(f"written to {target}", markup=False, soft_wrap=True)
    if picture is not None:
        from kvswap.tuning.plots import draw_reads

        draw_reads(found.disks, picture)
        console.print(f"plotted to {picture}", markup=False, soft_wrap=True)


def show(console: Console, found: Profile) -> None:
    """Print the tables of a profile."""
    for disk in found.disks:
        _show_disk(console, disk)
    if found.costs is not None and found.model is not None:
        _show_model(console, found)


def _show_disk(console: Console, disk: DiskCosts) -> None:
    from rich.table import Table

    from kvswap.units import KIB, format_rate

    where = "direct I/O" if disk.direct_io else "page cache: NOT the disk"
    depths = sorted({point.depth for point in disk.bursts})
    table = Table(title=f"random reads, {disk.backend}, {where}", title_justify="left", box=None, pad_edge=False)
    for heading in ("read size", *(f"depth {depth}" for depth in depths), "p50", "p99"):
        table.add_column(heading, justify="right")
    rates = {(point.read_bytes, point.depth): point.bytes_per_s for point in disk.bursts}
    for size in sorted({point.read_bytes for point in disk.bursts}):
        name = f"{size // KIB} KiB" if size >= KIB else f"{size} B"
        alone = [f"{value:.0f} us" for value in disk.latency_us.get(str(size), [])]
        table.add_row(name, *(format_rate(rates[size, depth]) for depth in depths), *alone)
    console.print(table)
    console.print(
        f"sequential write {format_rate(disk.write_bytes_per_s)}; reads of {disk.read_size_bytes() // KIB} KiB are the "
        "smallest that reach 80 % of the best read rate; p50 and p99 are latencies of single reads\n",
        soft_wrap=True,
    )


def _show_model(console: Console, found: Profile) -> None:
    from rich.table import Table

    from kvswap.units import format_us

    costs, facts = found.costs, found.model
    assert costs is not None and facts is not None
    elements = facts.key_elements
    table = Table(title=f"{facts.name}, {facts.layers} layers on disk", title_justify="left", box=None, pad_edge=False)
    for heading in ("part of a step", "cost"):
        table.add_column(heading)
    rank = max(8, elements // 2)
    attended = costs.compute.of(attended=400.0)
    slots = costs.slots.of(groups=80.0, attended=400.0, capacity=0.0)
    rows = [
        ("compute of a layer, 400 attended tokens", format_us(float(attended))),
        ("slots of a layer, 80 selected groups, 400 attended tokens", format_us(float(slots))),
        ("submission of 32 reads", format_us(float(costs.submit.of(reads=32.0)))),
        *(
            (f"prediction of a layer at {tokens:,} tokens", format_us(costs.predict_s(tokens, rank, 4)))
            for tokens in sorted({point.tokens for point in costs.predict})
        ),
        ("outside the layers on disk", format_us(costs.outside_s)),
        ("prefill", f"{costs.prefill_tokens_per_s:.0f} tokens/s"),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
