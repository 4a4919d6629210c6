"""``kvswap tune``: find the parameters for a memory limit, and show predictions and reasons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvswap.cli.options import with_weights

if TYPE_CHECKING:
    from rich.console import Console

    from kvswap.tuning.solution import Solution


@click.command()
@click.option(
    "--model",
    required=True,
    metavar="MODEL",
    help="The model to tune for: a local directory, a .gguf file, a hub id, or smollm2-135m.",
)
@click.option(
    "--kv-memory",
    required=True,
    metavar="SIZE",
    help="Memory limit of the KV cache for all sequences together, such as 64MiB.",
)
@click.option(
    "--context",
    "contexts",
    required=True,
    multiple=True,
    type=int,
    metavar="N",
    help="Longest context in tokens. Give it several times for one solution each.",
)
@click.option(
    "--batch", type=int, default=1, show_default=True, metavar="N", help="Number of sequences decoded together."
)
@click.option(
    "--prefer",
    type=click.Choice(["quality", "speed"]),
    default="quality",
    show_default=True,
    help="quality: take the best KL among the nearly fastest. speed: take the fastest among those of nearly the best "
    "KL.",
)
@click.option(
    "--select-tokens",
    type=int,
    metavar="M",
    help="Tokens that a step attends to, as the mean over layers.  [default: as without tuning, by context and disk]",
)
@click.option(
    "--out", required=True, metavar="FILE", help="JSON file to write the configuration to, for kvswap run --config."
)
@click.option("--kv-dir", metavar="DIR", help="Folder for KV files.  [default: the user's cache folder]")
@click.option("--profile", metavar="FILE", help="Profile to use.  [default: the cached one, else one is measured now]")
@click.option(
    "--tables",
    metavar="FILE",
    help="Tables to use. If the file does not exist, tables are measured and written there.  [default: in the cache "
    "folder]",
)
@click.option("--force", is_flag=True, help="Accept a profile or tables from another machine, model or version.")
@click.option(
    "--verify",
    is_flag=True,
    help="Also run the first solution on evaluation text and compare the run with the prediction.",
)
@with_weights
def tune(
    model: str, out: str, contexts: tuple[int, ...], verify: bool, weights: str, no_mmap: bool, **options: Any
) -> None:
    """Find the parameters for a memory limit: sketch size, group size, selection by layer, memory for reuse.

    The first call measures the machine (about a minute) and the model on calibration text (several minutes). Both
    results are cached for later calls.

    For each solution it prints the reasons and the predicted speed, KL to full attention, and memory. Two KLs are
    shown: the mean over texts, by which settings are compared, and a bound that nine of ten texts are expected to stay
    below.

    \b
    Examples:
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
        loaded = load_weights(model, display, weights=weights, no_mmap=no_mmap)
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
    """Print one solution: the reasons and the predictions."""
    from kvswap.units import format_bytes, format_parts, format_us

    prediction = solution.prediction
    console.print(f"{solution.batch} x {solution.context_tokens:,} tokens", style="bold", markup=False)
    for line in solution.reasons:
        console.print(f"  {line}", markup=False, soft_wrap=True)
    parts = ", ".join(
        f"{name.removesuffix('_s')} {format_us(getattr(prediction, name))}"
        for name in ("compute_s", "predict_s", "slots_s", "submit_s", "wait_s")
    )
    memory, each = prediction.memory_parts, " per sequence" if solution.batch > 1 else ""
    for line in (
        f"expected: {prediction.tokens_per_s:.1f} tokens/s{each} ({parts})",
        f"quality: KL to full attention {prediction.expected_kl:.4f} expected in the mean over texts; 9 of 10 texts "
        f"are expected to stay below {prediction.kl_bound:.4f}",
        f"memory: {format_bytes(sum(memory.values()))}: {format_parts(memory)}",
    ):
        console.print(f"  {line}", markup=False, soft_wrap=True)


def show_comparison(console: Console, rows: list[tuple[str, float, float]]) -> None:
    """Print predicted and measured values side by side."""
    from rich.table import Table

    table = Table(title="predicted and measured", title_justify="left", box=None, pad_edge=False)
    for heading in ("", "predicted", "measured", "measured / predicted"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, predicted, measured in rows:
        ratio = f"{measured / predicted:.2f}" if predicted else ""
        table.add_row(name, f"{predicted:.4g}", f"{measured:.4g}", ratio)
    console.print(table)
