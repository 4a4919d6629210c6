"""``kvswap run``: one question about documents, answered on stdout."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from kvswap.baselines.registry import DISK, NAMES
from kvswap.cli.configs import read_config

if TYPE_CHECKING:
    from kvswap.config import Config
    from kvswap.engine import Engine
    from kvswap.models.loading import LoadedModel
    from kvswap.models.sampling import Sampling
    from kvswap.stats import RunStats
    from kvswap.store.folder import SessionFolder
    from kvswap.store.wear import Limits


@click.command()
@click.option("--model", required=True, metavar="MODEL", help="Local directory, .gguf file, hub id, or smollm2-135m.")
@click.option(
    "--document",
    "documents",
    multiple=True,
    metavar="FILE",
    help="Text, Markdown, source code or PDF; may be given several times.",
)
@click.option("--ask", "question", required=True, metavar="TEXT", help="The question. It comes after the documents.")
@click.option(
    "--kv-memory",
    metavar="SIZE",
    help="Memory that the KV cache may hold, such as 24MiB.  [default: auto, an eighth of the full 16-bit cache]",
)
@click.option("--kv-dir", metavar="DIR", help="Folder on a disk for KV files.  [default: the user's cache folder]")
@click.option(
    "--method",
    type=click.Choice(NAMES),
    default="kvswap",
    show_default=True,
    help="For comparison: full keeps the whole cache in memory, the others are published methods.",
)
@click.option("--max-new-tokens", type=int, default=256, show_default=True, metavar="N", help="Longest answer.")
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, metavar="T", help="0 takes the likeliest token."
)
@click.option(
    "--top-p", type=float, default=1.0, show_default=True, metavar="P", help="Sample from this share of probability."
)
@click.option("--seed", type=int, metavar="S", help="Make sampling repeatable.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Compute dtype. auto: the checkpoint's, or float32 on a CPU without bfloat16 instructions.",
)
@click.option("--no-mmap", is_flag=True, help="Copy the weights into memory instead of mapping their file.")
@click.option(
    "--config", "config_file", metavar="FILE", help="JSON object of further settings; options here override it."
)
@click.option(
    "--session",
    "session_name",
    metavar="NAME",
    help="Keep the context on disk under this name, or go on from where it was.",
)
@click.option(
    "--disk-quota",
    metavar="SIZE",
    help="Disk for all sessions together; closed ones make room, least recently used first.  [default: no limit]",
)
@click.option("--write-limit", metavar="SIZE", help="Most that may be written for sessions a day.  [default: no limit]")
@click.option("--no-verify", is_flag=True, help="Do not compare what is read of a session with its checksums.")
@click.option(
    "--check-quality",
    is_flag=True,
    help="Do some steps over again with exact attention, in 5 % of the time, and tell what selection costs.",
)
@click.option("--stats-json", metavar="FILE", help="Write all numbers of the run there.")
def run(
    model: str,
    documents: tuple[str, ...],
    question: str,
    kv_memory: str | None,
    kv_dir: str | None,
    method: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    dtype: str,
    no_mmap: bool,
    config_file: str | None,
    session_name: str | None,
    disk_quota: str | None,
    write_limit: str | None,
    no_verify: bool,
    check_quality: bool,
    stats_json: str | None,
) -> None:
    """Ask a model about documents, with its KV cache on disk.

    The answer goes to stdout, everything else to stderr.

    \b
    Example:
      kvswap run --model smollm2-135m --document notes.md --ask "What is decided?"
    """
    # What the user can get wrong is checked before the seconds that torch and a model take to load.
    from kvswap.cli.files import check_writable
    from kvswap.disk.files import default_kv_dir, prepare_dir
    from kvswap.documents import read_document
    from kvswap.errors import ConfigError
    from kvswap.jsonfile import write_json
    from kvswap.models.sampling import Sampling
    from kvswap.prompt import make_request

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    config, tuned = read_config(config_file, kv_memory=kv_memory, kv_dir=kv_dir)
    texts = [read_document(path) for path in documents]
    request = make_request(question, texts)
    target = None if stats_json is None else check_writable("--stats-json", stats_json)
    if check_quality and method != "kvswap":
        raise ConfigError(f"--check-quality with --method {method}", hint="it checks kvswap alone")
    if method in DISK:
        prepare_dir(config.kv_dir or default_kv_dir())
    limits = limits_of(disk_quota, write_limit)
    session = open_for_run(config, session_name, method)
    options: dict[str, Any] = {"method": method, "dtype": dtype, "mmap": not no_mmap, "verify": not no_verify}
    options |= {"session": session, "limits": limits, "check_quality": check_quality}
    if tuned is not None:
        options["choose"] = partial(tuned.choose, request=None if session else request, new_tokens=max_new_tokens)
    stats = _answer(model, config, question, texts, sampling, **options)
    if target is not None:
        write_json(target, stats.to_dict())


def _answer(
    model: str,
    config: Config,
    question: str,
    texts: list[Any],
    sampling: Sampling,
    *,
    check_quality: bool,
    **options: Any,
) -> RunStats:
    from kvswap.cli.display import Display

    display = Display()
    try:
        with load_engine(model, config, display, **options) as engine:
            engine.check_quality = check_quality
            if texts and engine.session is not None:
                engine.begin_anew()
            for text in engine.ask(question, texts, **dataclasses.asdict(sampling)):
                display.finish()
                click.echo(text, nl=False)
                sys.stdout.flush()
            click.echo()
            display.summary(engine.stats)
            return engine.stats
    finally:
        display.finish()


def open_for_run(config: Config, name: str | None, method: str) -> SessionFolder | None:
    """Open or make the session before anything heavy is loaded."""
    from kvswap.errors import ConfigError
    from kvswap.store.shelf import open_or_create

    if name is None:
        return None
    if method != "kvswap":
        raise ConfigError(f"--session with --method {method}", hint="only kvswap keeps sessions")
    return open_or_create(config.kv_dir, name)


def limits_of(disk_quota: str | None, write_limit: str | None) -> Limits:
    """The limits that two options state. Raises ConfigError."""
    from kvswap.store.wear import Limits
    from kvswap.units import parse_bytes

    return Limits(
        quota_bytes=None if disk_quota is None else parse_bytes(disk_quota, name="--disk-quota"),
        write_bytes=None if write_limit is None else parse_bytes(write_limit, name="--write-limit"),
    )


def load_engine(
    model: str,
    config: Config,
    display: Any,
    *,
    method: str = "kvswap",
    dtype: str = "auto",
    mmap: bool = True,
    session: SessionFolder | None = None,
    verify: bool = True,
    choose: Callable[[LoadedModel], Config] | None = None,
    limits: Limits | None = None,
) -> Engine:
    """An engine that tells ``display`` what it does. The session is closed with it, also when it cannot be loaded.

    ``choose`` gives the configuration instead of ``config`` once the model is there.
    """
    from kvswap.cli.loading import load_weights
    from kvswap.store.shelf import close_session

    try:
        loaded = load_weights(model, display, dtype=dtype, mmap=mmap)
        config = choose(loaded) if choose is not None else config
    except BaseException:
        if session is not None:
            close_session(session)
        raise
    from kvswap.engine import load

    tell: dict[str, Any] = {"on_progress": display.progress, "on_notice": display.notice}
    return load(loaded, config, method=method, session=session, verify=verify, limits=limits, **tell)
