"""``kvswap eval``: compare the quality of methods with full attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvswap.cli.configs import plain_config, split_list, split_numbers
from kvswap.cli.display import printable
from kvswap.cli.options import with_weights
from kvswap.lab.evals.tasks import TASKS

if TYPE_CHECKING:
    from kvswap.config import Config
    from kvswap.lab.evals.run import Plan
    from kvswap.lab.evals.samples import Source


@click.command("eval")
@click.option(
    "--model",
    required=True,
    metavar="MODEL",
    help="The model to evaluate: a local directory, a .gguf file, a hub id, or smollm2-135m.",
)
@click.option(
    "--task",
    "tasks",
    default="agreement",
    show_default=True,
    metavar="T,...",
    help=f"Tasks to run, separated by commas: {', '.join(TASKS)}.",
)
@click.option(
    "--methods",
    default="full,kvswap",
    show_default=True,
    metavar="M,...",
    help="Methods to compare. full always runs, because the others are compared with it.",
)
@click.option(
    "--context",
    "contexts",
    default="4096",
    show_default=True,
    metavar="N,...",
    help="Length limit of the prompts in tokens; several lengths are evaluated one after the other.",
)
@click.option(
    "--kv-memory",
    default="auto",
    show_default=True,
    metavar="SIZE,...",
    help="Memory limits of the methods on disk, such as 16MiB,24MiB. Every method runs under each of them.",
)
@click.option(
    "--setting",
    "settings",
    metavar="S,...",
    help="Size of every method's sketch: relaxed (D/8 x 2 bytes per token and layer) or tight (D/32 x 2). tight:8 also "
    "sets groups of 8 tokens.  [default: as configured]",
)
@click.option("--kv-dir", metavar="DIR", help="Folder on a disk for KV files.  [default: the user's cache folder]")
@click.option(
    "--samples",
    default=8,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Number of samples of each task and context.",
)
@click.option(
    "--texts",
    type=click.IntRange(1),
    metavar="N",
    help="Ask every question about N texts, for each task and context, in place of --samples.",
)
@click.option(
    "--steps",
    default=64,
    show_default=True,
    type=click.IntRange(2),
    metavar="N",
    help="Forced decode steps of each sample of the tasks agreement and perplexity.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(0.0),
    metavar="N",
    help="Stop after about N minutes; the same command continues later.  [default: no limit]",
)
@click.option(
    "--seed", default=0, show_default=True, metavar="S", help="Seed for the choice of texts, questions and answers."
)
@click.option(
    "--document",
    "documents",
    multiple=True,
    metavar="FILE",
    help="Evaluate on this text, in place of Python's documentation. May be given several times.",
)
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    metavar="FILE",
    help="LongBench file (JSONL) for the task longbench. May be given several times.",
)
@click.option(
    "--json",
    "json_file",
    required=True,
    metavar="FILE",
    help="Results file. If it exists, only what is missing in it is evaluated.",
)
@click.option(
    "--prompts",
    metavar="DIR",
    help="Keep computed prompts in this folder (large files), so that methods added later need not compute them.",
)
@click.option(
    "--plot", "plot_file", metavar="FILE", help="Also plot the results as .png, .svg or .pdf (needs kvswap[plots])."
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
def evaluate(
    model: str,
    tasks: str,
    methods: str,
    contexts: str,
    kv_memory: str,
    settings: str | None,
    kv_dir: str | None,
    samples: int,
    texts: int | None,
    steps: int,
    minutes: float | None,
    seed: int,
    documents: tuple[str, ...],
    datasets: tuple[str, ...],
    json_file: str,
    prompts: str | None,
    plot_file: str | None,
    config_file: str | None,
    **loading: Any,
) -> None:
    """Compare the quality of methods with full attention, on the same samples.

    The table goes to stdout and every sample into the results file. If a run is interrupted, the same command continues
    it. Scores are from 0 to 1; KL and nll are in nats per token.

    \b
    Examples:
      kvswap eval --model smollm2-135m --task agreement,perplexity --methods kvswap,window --json results.json
      kvswap eval --model smollm2-135m --task needle --context 2048,4096 --json needle.json --plot needle.png
    """
    from kvswap.cli.display import Display
    from kvswap.cli.files import check_writable
    from kvswap.disk.files import prepare_dir
    from kvswap.disk.folders import kv_folder
    from kvswap.lab.plots import plot_eval
    from kvswap.tuning.plots import check_plot

    target = check_writable("--json", json_file)
    picture = None if plot_file is None else check_plot(check_writable("--plot", plot_file))
    config = plain_config(config_file, kv_dir=kv_dir)
    plan = _plan(tasks, methods, contexts, kv_memory, settings, config, samples=samples, texts=texts)
    make_source = _source(documents, datasets, seed=seed, steps=steps)
    prepare_dir(kv_folder(config.kv_dir))
    from kvswap.cli.loading import load_weights

    display = Display()
    try:
        loaded = load_weights(model, display, **loading)
        source = make_source(tokenizer=loaded.tokenizer)
        rows = _evaluate(loaded, config, plan, source, display, file=target, prompts=prompts, minutes=minutes)
    finally:
        display.finish()
    _print_table([row for row in rows if row["task"] in [task.name for task in plan.tasks]])
    if picture is not None:
        plot_eval(target, picture)


def _source(documents: Sequence[str], datasets: Sequence[str], *, seed: int, steps: int) -> Callable[..., Source]:
    """Read texts; return what makes a source of them when a tokenizer is known."""
    from kvswap.app.documents import read_document
    from kvswap.disk.folders import user_path
    from kvswap.lab.evals.evaluation_text import evaluation_text
    from kvswap.lab.evals.samples import DOCUMENTS, PYTHON_TEXT, Source
    from kvswap.lab.evals.tasks.longbench import read_dataset

    return partial(
        Source,
        passages=evaluation_text([read_document(path) for path in documents], seed),
        kind=DOCUMENTS if documents else PYTHON_TEXT,
        seed=seed,
        steps=steps,
        datasets=[path for path in map(user_path, datasets) if read_dataset(path)],
    )


def _evaluate(
    loaded: Any,
    config: Config,
    plan: Plan,
    source: Source,
    display: Any,
    *,
    file: Path,
    prompts: str | None,
    minutes: float | None,
) -> list[Any]:
    from kvswap.disk.folders import user_path
    from kvswap.lab.evals.prompt_cache import PromptCache
    from kvswap.lab.evals.run import evaluate as run

    return run(
        loaded,
        config,
        plan,
        source,
        file=file,
        prompts=PromptCache(None if prompts is None else user_path(prompts)),
        limit_s=None if minutes is None else 60 * minutes,
        on_progress=display.progress,
        on_notice=display.notice,
    )


def _plan(
    tasks: str,
    methods: str,
    contexts: str,
    kv_memory: str,
    settings: str | None,
    config: Config,
    *,
    samples: int,
    texts: int | None,
) -> Plan:
    from kvswap.lab.evals.run import Plan
    from kvswap.lab.evals.tasks import find_task
    from kvswap.lab.evals.variants import SketchSetting
    from kvswap.lab.rivals.registry import check_name

    for method in split_list("--methods", methods):
        check_name(method)
    for limit in split_list("--kv-memory", kv_memory):
        config.replace(kv_memory=limit)  # which checks it
    return Plan(
        tasks=[find_task(name) for name in split_list("--task", tasks)],
        methods=split_list("--methods", methods),
        contexts=split_numbers("--context", contexts),
        kv_memory=split_list("--kv-memory", kv_memory),
        samples=samples,
        texts=texts,
        settings=[None]
        if settings is None
        else [SketchSetting.parse(each) for each in split_list("--setting", settings)],
    )


def _print_table(rows: list[dict[str, Any]]) -> None:
    from kvswap.units import format_bytes

    head = (
        "task",
        "method",
        "context",
        "setting",
        "memory limit",
        "n",
        "score",
        "± error",
        "of full",
        "± error",
        "KL",
        "± error",
        "nll",
    )
    lines = [head]
    for row in rows:
        limit = row["kv_memory_limit_bytes"]
        lines.append(
            (
                row["task"],
                row["method"],
                f"{row['context']:,}",
                row["setting"] or "",
                format_bytes(limit) if limit else "none",
                str(row["n"]),
                _number(row["score"]),
                _number(row["stderr"]),
                _percent(row["retention"]),
                _percent(row.get("retention_stderr")),
                _number(row["kl"]),
                _number(row["kl_stderr"]),
                _number(row["nll"]),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        cells = (
            cell.ljust(w) if n < 2 else cell.rjust(w) for n, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        click.echo(printable("  ".join(cells).rstrip()))
    for note in dict.fromkeys(row["note"] for row in rows if row["note"]):
        click.echo(f"note: {printable(note)}", err=True)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
