"""``kvswap run``: one question about documents, answered on stdout."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from kvswap.cli.options import Wanted, read_options, shared
from kvswap.lab.rivals.registry import DISK, NAMES

if TYPE_CHECKING:
    from kvswap.app.prompt import Request
    from kvswap.app.stats import RunStats
    from kvswap.sessions.folder import SessionFolder


@click.command()
@click.option("--ask", "question", required=True, metavar="TEXT", help="The question. It comes after the documents.")
@shared
@click.option(
    "--method",
    type=click.Choice(NAMES),
    default="kvswap",
    show_default=True,
    help="For comparison: full keeps the whole cache in memory, the others are published methods.",
)
@click.option("--stats-json", metavar="FILE", help="Write all numbers of the run there.")
def run(question: str, method: str, stats_json: str | None, **options: Any) -> None:
    """Ask a model about documents, with its KV cache on disk.

    The answer goes to stdout, everything else to stderr.

    \b
    Example:
      kvswap run --model smollm2-135m --document notes.md --ask "What is decided?"
    """
    # What the user can get wrong is checked before the seconds that torch and a model take to load.
    from kvswap.app.prompt import make_request
    from kvswap.cli.files import check_writable
    from kvswap.disk.files import prepare_dir
    from kvswap.disk.folders import kv_folder
    from kvswap.disk.json_files import write_json
    from kvswap.errors import ConfigError

    wanted = read_options(**options)
    request = make_request(question, wanted.texts)
    target = None if stats_json is None else check_writable("--stats-json", stats_json)
    if wanted.check_quality and method != "kvswap":
        raise ConfigError(f"--check-quality with --method {method}", hint="it checks kvswap alone")
    if method in DISK:
        prepare_dir(kv_folder(wanted.config.kv_dir))
    stats = _answer(wanted, question, request, wanted.open_session(method), method)
    if target is not None:
        write_json(target, stats.to_dict())


def _answer(wanted: Wanted, question: str, request: Request, session: SessionFolder | None, method: str) -> RunStats:
    from kvswap.cli.display import Display

    display = Display()
    try:
        with wanted.load(display, session, method=method, request=request) as engine:
            if wanted.texts and engine.session is not None:
                engine.begin_anew()
            for text in engine.ask(question, wanted.texts, **wanted.sampling):
                display.finish()
                click.echo(text, nl=False)
                sys.stdout.flush()
            click.echo()
            display.summary(engine.stats)
            return engine.stats
    finally:
        display.finish()
