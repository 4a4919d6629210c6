"""``kvswap bench``: compare methods on this machine, interleaved within one process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvswap.cli.configs import plain_config, split_list, split_numbers
from kvswap.cli.display import printable
from kvswap.cli.options import with_weights

if TYPE_CHECKING:
    from kvswap.config import Config
    from kvswap.lab.bench.run import Plan

Row = dict[str, Any]


@click.command()
@click.option(
    "--model",
    required=True,
    metavar="MODEL",
    help="The model to run: a local directory, a .gguf file, a hub id, or smollm2-135m.",
)
@click.option(
    "--context",
    "contexts",
    default="4096",
    show_default=True,
    metavar="N,...",
    help="Length of the prompts in tokens; several lengths are measured one after the other.",
)
@click.option(
    "--methods",
    default="full,kvswap",
    show_default=True,
    metavar="M,...",
    help="Methods to compare, or all. full always runs, because the others are compared with it. METHOD@FILE takes its "
    "settings from a configuration file or from a file of kvswap tune, instead of from --config.",
)
@click.option(
    "--batch",
    "batches",
    default="1",
    show_default=True,
    metavar="B,...",
    help="Number of sequences that are decoded together.",
)
@click.option(
    "--kv-memory",
    metavar="SIZE",
    help="Memory limit of every method that keeps its KV cache on disk, such as 64MiB.  [default: that of FILE, or "
    "auto]",
)
@click.option("--kv-dir", metavar="DIR", help="Folder on a disk for KV files.  [default: the user's cache folder]")
@click.option(
    "--new-tokens",
    default=64,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Decode steps of each turn. A turn is a block of consecutive steps of one method.",
)
@click.option(
    "--repeat",
    default=5,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Number of turns of each method. The methods' turns are interleaved.",
)
@click.option(
    "--prompts",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Number of different batches of prompts.",
)
@click.option(
    "--share-prompt",
    is_flag=True,
    help="Compute each prompt once for all methods. This is faster, but gives no time to first token.",
)
@click.option(
    "--document",
    "documents",
    multiple=True,
    metavar="FILE",
    help="Take the prompts' text from this file first, then from Python's documentation. May be given several times.",
)
@click.option(
    "--json",
    "json_file",
    required=True,
    metavar="FILE",
    help="Results file. If it exists, only what is missing in it is measured.",
)
@click.option(
    "--plot", "plot_file", metavar="FILE", help="Also plot the results as .png, .svg or .pdf (needs kvswap[plots])."
)
@click.option(
    "--peers",
    metavar="P,...",
    help="Compare kvswap with other programs on the same .gguf file, instead of with other methods. Known: llama.cpp "
    "(needs kvswap[peers]).",
)
@click.option(
    "--label", default="", metavar="TEXT", help="Note what is special about this run, such as a throttled disk."
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Compute dtype. auto takes the checkpoint's, or float32 on a CPU without bfloat16 instructions.",
)
@with_weights
@click.option("--config", "config_file", metavar="FILE", help="JSON file with further settings (docs/settings.md).")
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
    peers: str | None,
    label: str,
    config_file: str | None,
    **loading: Any,
) -> None:
    """Compare methods: speed, reads, memory, and agreement with full attention.

    All methods get the same prompts and then the same tokens. Their turns are interleaved, so that a machine that slows
    down does so for all. The table goes to stdout and every step into the results file. If a run is interrupted, the
    same command continues it.

    \b
    Examples:
      kvswap bench --model smollm2-135m --context 4096 --methods kvswap,window,mmap --json bench.json --plot bench.png
      kvswap bench --model smollm2-135m --methods kvswap,kvswap@tuned.json --json tuned-or-not.json
      kvswap bench --model FILE.gguf --peers llama.cpp --context 512,4096,32700 --json peers.json --plot peers.png
    """
    from kvswap.app.documents import read_document
    from kvswap.disk.files import prepare_dir
    from kvswap.disk.folders import kv_folder
    from kvswap.lab.evals.evaluation_text import evaluation_text
    from kvswap.lab.plots import plot_bench

    target, picture = _targets(json_file, plot_file)
    config = plain_config(config_file, kv_dir=kv_dir, kv_memory=kv_memory)
    if peers is not None:
        _check_peers(**loading)
        counts = {"new_tokens": new_tokens, "repeat": repeat, "label": label}
        _compare(model, config, split_list("--peers", peers), contexts, counts, documents, target, picture)
        return
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
    prepare_dir(kv_folder(config.kv_dir))
    rows = _measure(model, config, plan, passages, target, loading)
    _print_table(rows)
    if picture is not None:
        plot_bench(rows, picture, f"{model}{', ' + label if label else ''}")


def _targets(json_file: str, plot_file: str | None) -> tuple[Path, Path | None]:
    """The files to write, checked before the run. Raises ConfigError."""
    from kvswap.cli.files import check_writable
    from kvswap.tuning.plots import check_plot

    picture = check_writable("--plot", plot_file) if plot_file is not None else None
    if picture is not None:
        check_plot(picture)
    return check_writable("--json", json_file), picture


def _measure(
    model: str, config: Config, plan: Plan, passages: list[tuple[str, str]], target: Path, loading: dict[str, Any]
) -> list[Row]:
    """Run the benchmark; return the rows of the plan, which may be fewer than those of the file."""
    from kvswap.cli.display import Display
    from kvswap.cli.loading import load_weights

    display = Display()
    try:
        loaded = load_weights(model, display, **loading)
        from kvswap.lab.bench.run import bench as run

        content = run(
            loaded, config, plan, passages, file=target, on_progress=display.progress, on_notice=display.notice
        )
    finally:
        display.finish()
    keys = [(context, batch, name) for context in plan.contexts for batch in plan.batches for name in plan.names]
    rows = {(row["context"], row["batch"], row["method"]): row for row in content["results"]}
    return [rows[key] for key in keys]


def _check_peers(*, dtype: str, weights: str, no_mmap: bool) -> None:
    """Raise ConfigError for options about weights: every program runs the file as it is."""
    from kvswap.errors import ConfigError

    if (dtype, weights, no_mmap) != ("auto", "auto", False):
        raise ConfigError(
            "--peers with --dtype, --weights or --no-mmap", hint="leave them out: the file runs as it is, mapped"
        )


def _compare(
    model: str,
    config: Config,
    peers: list[str],
    contexts: str,
    counts: dict[str, Any],
    documents: tuple[str, ...],
    target: Path,
    picture: Path | None,
) -> None:
    """Measure kvswap beside other programs, each in a process of its own."""
    from kvswap.cli.display import Display
    from kvswap.lab.peers import report
    from kvswap.lab.peers.run import Plan, compare
    from kvswap.models.gguf import gguf_file
    from kvswap.tuning.machine import cores

    file = gguf_file(model)
    plan = Plan(peers=peers, contexts=split_numbers("--context", contexts), threads=cores(), **counts)
    display = Display()
    try:
        rows = compare(model, file, config, plan, documents=documents, file=target, on_progress=display.progress)
    finally:
        display.finish()
    for line in report.table(rows):
        click.echo(printable(line))
    if picture is not None:
        report.plot(rows, picture, file.name)


def _methods(methods: str, kv_memory: str | None, kv_dir: str | None) -> dict[str, Any]:
    """Return the names and the variants among them, as arguments of the plan."""
    from kvswap.lab.bench.variants import read_variants
    from kvswap.lab.rivals.registry import NAMES

    given = list(NAMES) if methods.strip() == "all" else split_list("--methods", methods)
    names, variants = read_variants(given, kv_memory=kv_memory, kv_dir=kv_dir)
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
        click.echo(printable(line))
