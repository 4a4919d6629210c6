"""``kvswap bench``: methods beside each other on this machine, in turns within one process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvswap.cli.configs import plain_config, split_list, split_numbers

if TYPE_CHECKING:
    from kvswap.config import Config
    from kvswap.lab.bench.run import Plan

Row = dict[str, Any]


@click.command()
@click.option("--model", required=True, metavar="MODEL", help="Local directory, .gguf file, hub id, or smollm2-135m.")
@click.option(
    "--context", "contexts", default="4096", show_default=True, metavar="N,...", help="Tokens of each prompt."
)
@click.option(
    "--methods",
    default="full,kvswap",
    show_default=True,
    metavar="M,...",
    help="Methods, or all; full is always run. kvswap@FILE has the settings of a file, as --config or kvswap tune have "
    "them, instead of those of --config.",
)
@click.option("--batch", "batches", default="1", show_default=True, metavar="B,...", help="Sequences decoded together.")
@click.option(
    "--kv-memory", metavar="SIZE", help="Memory limit of every method on disk.  [default: that of FILE, or auto]"
)
@click.option("--kv-dir", metavar="DIR", help="Folder on a disk for KV files.  [default: the user's cache folder]")
@click.option(
    "--new-tokens", default=64, show_default=True, type=click.IntRange(1), metavar="N", help="Steps of each turn."
)
@click.option(
    "--repeat", default=5, show_default=True, type=click.IntRange(1), metavar="N", help="Turns of each method."
)
@click.option(
    "--prompts", default=1, show_default=True, type=click.IntRange(1), metavar="N", help="Batches of prompts."
)
@click.option(
    "--share-prompt",
    is_flag=True,
    help="Compute each prompt once, for all methods: quicker, but no time to first token.",
)
@click.option(
    "--document", "documents", multiple=True, metavar="FILE", help="Text of the prompts, before Python's own."
)
@click.option("--json", "json_file", required=True, metavar="FILE", help="Results; continued if it is there already.")
@click.option("--plot", "plot_file", metavar="FILE.png", help="Also draw them.  [needs kvswap[plots]]")
@click.option("--label", default="", metavar="TEXT", help="What is special about this run, such as a throttled disk.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Compute dtype, as for kvswap run.",
)
@click.option("--config", "config_file", metavar="FILE", help="JSON object of further settings.")
def bench(
    model: str,
    contexts: str,
    methods: str,
    batches: str,
    kv_memory: str | None,
    kv_dir: str | None,
    new_tokens: int,
    repeat: int,
    prompts: int,
    share_prompt: bool,
    documents: tuple[str, ...],
    json_file: str,
    plot_file: str | None,
    label: str,
    dtype: str,
    config_file: str | None,
) -> None:
    """Measure methods beside each other: speed, reads, memory, and agreement with full attention.

    All of them take the same prompts and then the same tokens, in turns of some steps each. The table goes to stdout,
    every step into the results file; a run that was broken off goes on where it was.

    \b
    Example:
      kvswap bench --model smollm2-135m --context 4096 --methods kvswap,window,mmap --json bench.json --plot bench.png
      kvswap bench --model smollm2-135m --methods kvswap,kvswap@tuned.json --json tuned-or-not.json
    """
    from kvswap.app.documents import read_document
    from kvswap.cli.files import check_writable
    from kvswap.disk.files import default_kv_dir, prepare_dir
    from kvswap.lab.evals.evaluation_text import evaluation_text
    from kvswap.lab.plots import plot_bench
    from kvswap.tuning.plots import check_plot

    target = check_writable("--json", json_file)
    picture = check_writable("--plot", plot_file) if plot_file is not None else None
    if picture is not None:
        check_plot(picture)
    config = plain_config(config_file, kv_dir=kv_dir, kv_memory=kv_memory)
    plan = _plan(
        contexts,
        batches,
        **_methods(methods, kv_memory, config.kv_dir),
        new_tokens=new_tokens,
        repeat=repeat,
        prompts=prompts,
        share_prompt=share_prompt,
        label=label,
    )
    passages = evaluation_text([read_document(path) for path in documents])
    prepare_dir(config.kv_dir or default_kv_dir())
    rows = _measure(model, config, plan, passages, target, dtype)
    _print_table(rows)
    if picture is not None:
        plot_bench(rows, picture, f"{model}{', ' + label if label else ''}")


def _measure(
    model: str, config: Config, plan: Plan, passages: list[tuple[str, str]], target: Path, dtype: str
) -> list[Row]:
    from kvswap.cli.display import Display
    from kvswap.cli.loading import load_weights

    display = Display()
    try:
        loaded = load_weights(model, display, dtype=dtype)
        from kvswap.lab.bench.run import bench as run

        content = run(
            loaded, config, plan, passages, file=target, on_progress=display.progress, on_notice=display.notice
        )
    finally:
        display.finish()
    wanted = [(context, batch, name) for context in plan.contexts for batch in plan.batches for name in plan.names]
    rows = {(row["context"], row["batch"], row["method"]): row for row in content["results"]}
    return [rows[place] for place in wanted]


def _methods(methods: str, kv_memory: str | None, kv_dir: str | None) -> dict[str, Any]:
    """Names, and the variants among them, as the plan takes both."""
    from kvswap.lab.bench.variants import read_variants
    from kvswap.lab.rivals.registry import NAMES

    wanted = list(NAMES) if methods.strip() == "all" else split_list("--methods", methods)
    names, variants = read_variants(wanted, kv_memory=kv_memory, kv_dir=kv_dir)
    return {"methods": names, "variants": variants}


def _plan(contexts: str, batches: str, **options: Any) -> Plan:
    from kvswap.lab.bench.run import Plan

    return Plan(
        contexts=split_numbers("--context", contexts),
        batches=split_numbers("--batch", batches),
        **options,
    )


def _print_table(rows: list[Row]) -> None:
    from kvswap.lab.tables import plain_table

    for line in plain_table(rows):
        click.echo(line)
