"""``kvswap chat``: a conversation of several turns, kept in a session if it has one.

Answers go to stdout, everything else to stderr. Ctrl-C ends an answer, Ctrl-D the chat.
"""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from kvswap.cli.options import read_options, shared
from kvswap.errors import ConfigError, SessionError, UserError

if TYPE_CHECKING:
    from kvswap.app.engine import Engine

HELP = {
    "/stats": "the numbers of the last answer",
    "/undo": "take back the last turn",
    "/fork NAME": "a second session that begins as this one is now",
    "/save": "say what is on disk; every turn is, as soon as it is complete",
    "/help": "these lines",
    "/quit": "end; so does Ctrl-D",
}


@click.command()
@shared
def chat(**options: Any) -> None:
    """Talk with a model; the context stays on disk, and each turn computes only what is new.

    \b
    Example:
      kvswap chat --model smollm2-135m --session diary
    """
    from kvswap.cli.display import Display

    if sys.stdin.isatty():
        check_line_editing()
    wanted = read_options(**options)
    session = wanted.open_session()
    display = Display()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ends an answer; the chat goes on
    with wanted.load(display, session) as engine:
        _talk(engine, display, wanted.texts, wanted.sampling)


def check_line_editing() -> None:
    """Find out before a model is loaded whether lines can be edited here. Raises ConfigError."""
    if importlib.util.find_spec("prompt_toolkit") is None:
        raise ConfigError(
            "a chat on a terminal needs prompt_toolkit",
            hint="run: pip install 'kvswap[chat]', or give the lines on standard input",
        )


def _talk(engine: Engine, display: Any, documents: list[Any], sampling: dict[str, Any]) -> None:
    if engine.session is not None and engine.session.tokens:
        display.notice(f"session {engine.session.name} goes on: {engine.session.tokens:,} tokens are there")
    for line in _lines():
        words = line.split()
        if not words:
            continue
        try:
            if words[0].startswith("/"):
                if words[0] == "/quit":
                    return
                _command(engine, display, words)
                continue
            _answer(engine, display, line, documents, sampling)
            documents = []
        except UserError as error:  # the next line may do better
            display.finish()
            click.echo(f"error: {error}", err=True)


def _answer(engine: Engine, display: Any, question: str, documents: list[Any], sampling: dict[str, Any]) -> None:
    try:
        for text in engine.ask(question, documents, **sampling):
            display.finish()
            click.echo(text, nl=False)
            sys.stdout.flush()
    except KeyboardInterrupt:
        display.finish()
    click.echo()


def _command(engine: Engine, display: Any, words: list[str]) -> None:
    commands: dict[str, Callable[..., None]] = {
        "/stats": lambda: display.summary(engine.stats),
        "/undo": engine.undo,
        "/fork": lambda name: _fork(engine, display, name),
        "/save": lambda: _save(engine, display),
        "/help": _help,
    }
    wanted = 2 if words[0] == "/fork" else 1
    if words[0] not in commands or len(words) != wanted:
        raise SessionError(f"command {' '.join(words)[:60]!r}", hint=f"use one of {', '.join(HELP)}")
    commands[words[0]](*words[1:])
    if words[0] == "/undo":
        display.notice(f"taken back; {_session(engine).tokens:,} tokens are left")


def _fork(engine: Engine, display: Any, name: str) -> None:
    _session(engine).fork(name)
    display.notice(f"session {name} begins as this one is now")


def _save(engine: Engine, display: Any) -> None:
    session = _session(engine)
    display.notice(f"{session.tokens:,} tokens are on disk in {session.folder.folder.path}")


def _session(engine: Engine) -> Any:
    if engine.session is None:
        raise SessionError("this chat has no session", hint="start it with --session NAME")
    return engine.session


def _help() -> None:
    for command, meaning in HELP.items():
        click.echo(f"{command:12} {meaning}", err=True)


def _lines() -> Iterator[str]:
    """What the user types: with line editing on a terminal, as it comes elsewhere. Kept in memory alone."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    from prompt_toolkit import PromptSession

    prompt: PromptSession[str] = PromptSession()
    while True:
        try:
            yield prompt.prompt("> ")
        except KeyboardInterrupt:  # the line is dropped
            continue
        except EOFError:
            return
