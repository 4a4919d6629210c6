"""The ``kvswap`` command. Subcommands are imported when called, so that ``--help`` loads nothing heavy.

Every expected error becomes one line on stderr and an exit code: 2 for mistakes of the user, 1 for failures at run
time, 130 for Ctrl-C, 143 for SIGTERM. An exception that nobody expected is one line as well, which says where its log
is (``last_resort``). A traceback is shown only with ``-v``.

Warnings of the logger ``kvswap`` appear on stderr as notices. With ``-v``, before or after the subcommand, its debug
messages appear too, each with its level and its module.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn, TextIO

import click

from kvswap.cli.display import printable
from kvswap.errors import KVSwapError

COMMANDS = {
    "run": ("kvswap.cli.run:run", "Ask a model about documents, with its KV cache on disk."),
    "eval": ("kvswap.cli.eval:evaluate", "Compare the quality of methods with full attention."),
    "profile": ("kvswap.cli.profile:profile", "Measure the speed of this disk and the costs of a model."),
    "tune": ("kvswap.cli.tune:tune", "Find the parameters for a memory limit."),
    "chat": ("kvswap.cli.chat:chat", "Hold a conversation with a model."),
    "serve": ("kvswap.cli.serve:serve", "Serve a model to OpenAI's clients, with contexts that survive."),
    "sessions": ("kvswap.cli.sessions:sessions", "List, check, repair, fork, export and remove stored contexts."),
    "doctor": ("kvswap.cli.doctor:doctor", "Examine this machine and the folder for KV files."),
    "bench": ("kvswap.cli.bench:bench", "Compare the speed and memory of methods on this machine."),
}


class LazyGroup(click.Group):
    """A group whose commands are import paths until one is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command; return it with ``--verbose`` added to its options."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = copy.copy(getattr(importlib.import_module(module), name))
        command.params = [*command.params, _verbose_option()]
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with their summaries, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Call the command; with ``--verbose``, show the traceback of its error before the error ends it."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception:
            logging.getLogger("kvswap.cli").debug("the command failed", exc_info=True)
            raise


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"kvswap {version('kvswap')}")
        ctx.exit()


class _StderrHandler(logging.Handler):
    """Writes warnings as notices, and with ``verbose`` every record with its level and its module."""

    def __init__(self, *, verbose: bool) -> None:
        super().__init__(logging.DEBUG if verbose else logging.WARNING)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s" if verbose else "note: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record to stderr."""
        click.echo(printable(self.format(record), lines=True), err=True)


@contextlib.contextmanager
def log_to_stderr(*, verbose: bool) -> Iterator[None]:
    """Show records of the logger ``kvswap`` on stderr inside the block: warnings, or with ``verbose`` everything."""
    logger = logging.getLogger("kvswap")
    level, handlers, handler = logger.level, logger.handlers, _StderrHandler(verbose=verbose)
    logger.handlers = [handler]  # replaces the quieter one when -v is given
    if verbose:
        logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.handlers = handlers
        logger.setLevel(level)


def _verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    root = ctx.find_root()
    if value and not ctx.resilient_parsing and not root.meta.get("kvswap.verbose"):
        root.meta["kvswap.verbose"] = True
        root.with_resource(log_to_stderr(verbose=True))


def _verbose_option() -> click.Option:
    return click.Option(
        ["-v", "--verbose"],
        is_flag=True,
        expose_value=False,
        callback=_verbose,
        help="Also show debug messages on stderr.",
    )


@click.group(
    cls=LazyGroup,
    params=[_verbose_option()],
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Run `kvswap COMMAND --help` for the options of a command, and `kvswap -v COMMAND ...` for debug messages.",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit."
)
def kvswap() -> None:
    """Run language models over long contexts, with the KV cache on disk and a memory limit that you set."""


def main() -> NoReturn:
    """Run the command of ``sys.argv`` and exit with its code."""
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    _open_streams()
    from kvswap.cli.last_resort import install

    install(_show_error, sys.argv[1:])
    code = run_command(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = max(code, _let_go(stream))
    sys.exit(code)


def run_command(arguments: list[str]) -> int:
    """Run a command and return its exit code. An error becomes one line on stderr."""
    try:
        return _run(arguments)
    except BrokenPipeError:  # whoever read stdout has ended
        return _let_go(sys.stdout)
    except Exception as error:  # noqa: BLE001 - whatever it is, the user gets a line that says what to do
        return _fail(_unexpected(error, arguments), 1)


def _run(arguments: list[str]) -> int:
    """As ``run_command``, for the errors that are expected."""
    try:
        with log_to_stderr(verbose=False):
            result = kvswap.main(arguments, prog_name="kvswap", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except KVSwapError as error:
        return _fail("; ".join([str(error), *getattr(error, "__notes__", ())]), error.exit_code)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        return _fail(f"{error.format_message()} See: {context.command_path if context else 'kvswap'} --help", 2)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", 130)


def _unexpected(error: Exception, arguments: list[str]) -> str:
    """The line about an exception that no command has made into an error of kvswap."""
    from kvswap.cli.last_resort import is_out_of_memory, report

    if is_out_of_memory(error):
        return "out of memory: use a smaller model or a shorter context"
    line = report(error, arguments)
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; {line}"
    return line


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # a full disk behind stdout must not hide the message
        sys.stdout.flush()
    _show_error(message)
    return code


def _show_error(message: str) -> None:
    with contextlib.suppress(OSError):
        click.echo(f"error: {printable(' '.join(message.split()))}", err=True)


def _let_go(stream: TextIO) -> int:
    """Leave what a stream still holds, because nobody can take it: Python would try again at its end, and complain."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return 1


def _open_streams() -> None:
    """Give a command all three streams, also where the shell closed one, and let any text be written to them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - until the command ends
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End the command in order; a second signal ends it at once. KV files have no names, so none remain either way."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda number, frame: os._exit(128 + number))
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
