"""``kvswap chat``: a conversation of several turns, which a session stores if one is named.

Answers go to stdout, everything else to stderr. Ctrl-C ends an answer, Ctrl-D the chat.
"""

from __future__ import annotations

import io
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from kvswap.cli.display import printable, show_answer
from kvswap.cli.options import read_options, shared
from kvswap.errors import SessionError, UserError

if TYPE_CHECKING:
    from kvswap.app.engine import Engine

HELP = {
    "/stats": "the numbers of the last answer",
    "/sources": "the passages that the last answer attended to most",
    "/undo": "take back the last turn",
    "/fork NAME": "create a second session that begins as this one is now",
    "/save": "say what is on disk; every turn is, as soon as it is complete",
    "/help": "these lines",
    "/quit": "end the chat; so does Ctrl-D",
    "//...": "a question that begins with /, such as //tmp; a path with more than one / needs no second one",
}
_COMMAND = re.compile(r"/[A-Za-z]*")
_PROMPT = "> "


@click.command()
@shared
def chat(**values: Any) -> None:
    """Talk with a model; the context stays on disk, and each turn computes only what is new.

    \b
    Example:
      kvswap chat --model smollm2-135m --session diary
    """
    from kvswap.cli.display import Display

    options = read_options(**values)
    session = options.open_session()
    display = Display()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ends an answer; the chat continues
    with options.load(display, session) as engine:
        settings = {"system": options.system, **options.sampling}
        _converse(engine, display, options.documents, settings, sources=options.show_sources is not None)


def _converse(
    engine: Engine, display: Any, documents: list[Any], settings: dict[str, Any], *, sources: bool = False
) -> None:
    if engine.session is not None and engine.session.tokens:
        display.notice(f"session {engine.session.name} continues with {engine.session.tokens:,} stored tokens")
        if documents and engine.knows(documents):
            display.notice("the documents are part of it already")
            documents = []
    for line in _lines(display):
        words = line.split()
        if not words:
            continue
        try:
            if words == ["/quit"]:
                return
            if _COMMAND.fullmatch(words[0]):
                _command(engine, display, words)
                continue
            question = line.strip().removeprefix("/") if words[0].startswith("//") else line
            _answer(engine, display, question, documents, settings)
            if sources:
                display.sources(engine.stats)
            documents = []
        except UserError as error:  # a mistake does not end the chat
            display.finish()
            click.echo(f"error: {printable(str(error))}", err=True)


def _answer(engine: Engine, display: Any, question: str, documents: list[Any], settings: dict[str, Any]) -> None:
    try:
        for text in engine.ask(question, documents, **settings):
            display.finish()
            show_answer(text)
    except KeyboardInterrupt:
        display.finish()
    click.echo()


# ---- commands


def _command(engine: Engine, display: Any, words: list[str]) -> None:
    commands: dict[str, Callable[..., None]] = {
        "/stats": lambda: display.summary(engine.stats),
        "/sources": lambda: display.sources(engine.stats),
        "/undo": lambda: _undo(engine, display),
        "/fork": lambda name: _fork(engine, display, name),
        "/save": lambda: _save(engine, display),
        "/help": _help,
    }
    expected = 2 if words[0] == "/fork" else 1
    if words[0] not in commands or len(words) != expected:
        raise SessionError(
            f"command {' '.join(words)[:60]!r}",
            hint=f"use one of {_names()}; a question that begins with / is written with //",
        )
    commands[words[0]](*words[1:])


def _undo(engine: Engine, display: Any) -> None:
    engine.undo()
    display.notice(f"taken back; {_session(engine).tokens:,} tokens are left")


def _fork(engine: Engine, display: Any, name: str) -> None:
    _session(engine).fork(name)
    display.notice(f"session {name} begins as this one is now")


def _save(engine: Engine, display: Any) -> None:
    session = _session(engine)
    display.notice(f"{session.tokens:,} tokens are on disk in {session.store.folder.path}")


def _session(engine: Engine) -> Any:
    if engine.session is None:
        raise SessionError("this chat has no session", hint="start it with --session NAME")
    return engine.session


def _names() -> str:
    return ", ".join(command for command in HELP if not command.startswith("//"))


def _help() -> None:
    for command, meaning in HELP.items():
        click.echo(f"{command:12} {meaning}", err=True)


# ---- what the user types


def _lines(display: Any) -> Iterator[str]:
    """Lines from stdin; from a terminal with a prompt, and with line editing where prompt_toolkit is installed."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are not UTF-8 make one line a mistake, not all
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    read_line = _line_reader(display)
    while True:
        try:
            yield read_line(_PROMPT)
        except KeyboardInterrupt:  # the line is dropped
            continue
        except EOFError:
            return


def _line_reader(display: Any) -> Callable[[str], str]:
    """What reads a line from a terminal. The history of prompt_toolkit stays in memory."""
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        display.notice("lines cannot be edited; for that: pip install 'kvswap[chat]'")
        return _read_plain_line
    prompt: PromptSession[str] = PromptSession()
    return prompt.prompt


def _read_plain_line(prompt: str) -> str:
    click.echo(prompt, nl=False, err=True)  # input() would write it to stdout, among the answers
    return input()
