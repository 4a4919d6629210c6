"""``kvswap tune``: the parameters for a memory limit, why, and what they promise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from kvswap.tuning.tuned import Solution


@click.command()
@click.option("--model", required=True, metavar="MODEL", help="Local directory, .gguf file, hub id, or smollm2-135m.")
@click.option("--kv-memory", required=True, metavar="SIZE", help="Memory that the KV cache may hold, such as 64MiB.")
@click.option(
    "--context",
    "contexts",
    required=True,
    multiple=True,
    type=int,
    metavar="N",
    help="Longest context, in tokens; given several times, each gets a solution.",
)
@click.option("--batch", type=int, default=1, show_default=True, metavar="N", help="Sequences decoded together.")
@click.option(
    "--prefer",
    type=click.Choice(["quality", "speed"]),
    default="quality",
    show_default=True,
    help="quality: the best that is nearly as fast as the fastest. speed: the fastest that is nearly as good.",
)
@click.option(
    "--select-tokens",
    type=int,
    default=400,
    show_default=True,
    metavar="M",
    help="Tokens attended to, mean over layers.",
)
@click.option("--out", required=True, metavar="FILE", help="Write the configuration there, for kvswap run --config.")
@click.option("--kv-dir", metavar="DIR", help="Folder for KV files.  [default: the user's cache folder]")
@click.option("--profile", metavar="FILE", help="Profile to use.  [default: the cached one, or measured now]")
@click.option(
    "--tables",
    metavar="FILE",
    help="Tables to use, or where to keep them when the file is not there yet.  [default: in the cache folder]",
)
@click.option("--force", is_flag=True, help="Use a profile or tables of another machine, model or version.")
@click.option("--verify", is_flag=True, help="Also run the first solution on a text and compare with the promise.")
def tune(model: str, out: str, contexts: tuple[int, ...], verify: bool, **options: Any) -> None:
    """Find the parameters for a memory limit: sketch, group size, selection of each layer, room for reuse.

    The first time it measures the machine (a minute) and the model (some minutes on calibration text); both are kept.

    The KL to full attention that is promised is one that nine of ten texts stay below, since texts differ a lot in it.
    What is expected in the mean over texts is said beside it; settings are compared by that.

    \b
    Example:
      kvswap tune --model smollm2-135m --kv-memory 24MiB --context 8192 --out tuned.json
      kvswap run --config tuned.json --model smollm2-135m --document notes.md --ask "What is decided?"
    """
    from rich.console import Console

    from kvswap.cli.display import Display
    from kvswap.cli.files import check_writable
    from kvswap.cli.loading import load_weights
    from kvswap.units import parse_bytes

    check_writable("--out", out)
    parse_bytes(options["kv_memory"], name="kv_memory")
    display = Display()
    try:
        loaded = load_weights(model, display, dtype="auto")
        from kvswap.tuning.tune import tune as find

        tuned = find(loaded, context_tokens=contexts, on_progress=display.progress, on_notice=display.notice, **options)
        tuned.save(out)
        display.finish()
        console = Console(highlight=False)
        for solution in tuned.solutions:
            show(console, solution)
        console.print(f"written to {out}", markup=False, soft_wrap=True)
        if verify:
            from kvswap.lab.verify import verify as run

            rows = run(loaded, tuned.solutions[0], on_progress=display.progress)
            display.finish()
            show_comparison(console, rows)
    finally:
        display.finish()


def show(console: Console, solution: Solution) -> None:
    """One solution: what was chosen, why, and what it promises."""
    from kvswap.units import format_bytes, format_parts, format_us

    promise = solution.promise
    console.print(f"{solution.batch} x {solution.context_tokens:,} tokens", style="bold", markup=False)
    for line in solution.reasons:
        console.print(f"  {line}", markup=False, soft_wrap=True)
    parts = ", ".join(
        f"{name.removesuffix('_s')} {format_us(getattr(promise, name))}"
        for name in ("compute_s", "predict_s", "slots_s", "submit_s", "wait_s")
    )
    memory, each = promise.memory_parts, " of each sequence" if solution.batch > 1 else ""
    for line in (
        f"expected: {promise.tokens_per_s:.1f} tokens/s{each} ({parts})",
        f"quality: KL to full attention {promise.expected_kl:.4f} expected in the mean over texts; promised: 9 of 10 "
        f"texts stay below {promise.promised_kl:.4f}",
        f"memory: {format_bytes(sum(memory.values()))}: {format_parts(memory)}",
    ):
        console.print(f"  {line}", markup=False, soft_wrap=True)


def show_comparison(console: Console, rows: list[tuple[str, float, float]]) -> None:
    """Promised beside measured."""
    from rich.table import Table

    table = Table(title="promised and measured", title_justify="left", box=None, pad_edge=False)
    for heading in ("", "promised", "measured", "measured / promised"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, promised, measured in rows:
        ratio = f"{measured / promised:.2f}" if promised else ""
        table.add_row(name, f"{promised:.4g}", f"{measured:.4g}", ratio)
    console.print(table)
