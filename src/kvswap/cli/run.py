"""``kvswap run``: one question about documents, answered on stdout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvswap.cli.options import RunOptions, read_options, shared
from kvswap.lab.rivals.registry import DISK, NAMES

if TYPE_CHECKING:
    from kvswap.app.prompt import Message
    from kvswap.app.stats import RunStats
    from kvswap.sessions.commits import SessionStore


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
def run(question: str, method: str, stats_json: str | None, **values: Any) -> None:
    """Ask a model about documents, with its KV cache on disk.

    The answer goes to stdout, everything else to stderr.

    \b
    Example:
      kvswap run --model smollm2-135m --document notes.md --ask "What is decided?"
    """
    # Mistakes of the user are reported before torch and a model are loaded, which takes seconds.
    from kvswap.app.prompt import make_request, with_system
    from kvswap.cli.files import check_writable
    from kvswap.disk.files import prepare_dir
    from kvswap.disk.folders import kv_folder
    from kvswap.disk.json_files import write_json
    from kvswap.errors import ConfigError

    options = read_options(**values)
    messages = with_system([make_request(question, options.documents)], options.system)
    target = None if stats_json is None else check_writable("--stats-json", stats_json)
    for given, name in ((options.check_quality, "--check-quality"), (options.show_sources, "--show-sources")):
        if given and method != "kvswap":
            raise ConfigError(f"{name} with --method {method}", hint="only kvswap estimates what it attends to")
    if method in DISK:
        prepare_dir(kv_folder(options.config.kv_dir))
    stats = _answer(options, question, messages, options.open_session(method), method)
    if target is not None:
        write_json(target, stats.to_dict())


def _answer(
    options: RunOptions, question: str, messages: list[Message], session: SessionStore | None, method: str
) -> RunStats:
    from kvswap.cli.display import Display, show_answer

    display = Display()
    try:
        with options.load(display, session, method=method, messages=messages) as engine:
            if options.documents and engine.session is not None:
                engine.new_conversation()
            for text in engine.ask(question, options.documents, system=options.system, **options.sampling):
                display.finish()
                show_answer(text)
            click.echo()
            if options.show_sources is not None:
                display.sources(engine.stats)
            display.summary(engine.stats)
            return engine.stats
    finally:
        display.finish()
