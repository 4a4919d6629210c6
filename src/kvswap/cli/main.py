"""The ``kvswap`` command. Subcommands are imported when called, so that ``--help`` loads nothing heavy.

Every expected error becomes one line on stderr and an exit code: 2 for mistakes of the user, 1 for failures at run
time, 130 for Ctrl-C, 143 for SIGTERM.

Warnings of the logger ``kvswap`` appear on stderr as notices. With ``-v``, before or after the subcommand, its debug
messages appear too, each with its level and its module.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import click

from kvswap.errors import KVSwapError

COMMANDS = {
    "run": ("kvswap.cli.run:run", "Ask a model about documents, with its KV cache on disk."),
    "eval": ("kvswap.cli.eval:evaluate", "Compare the quality of methods with full attention."),
    "profile": ("kvswap.cli.profile:profile", "Measure the speed of this disk and the costs of a model."),
    "tune": ("kvswap.cli.tune:tune", "Find the parameters for a memory limit."),
    "chat": ("kvswap.cli.chat:chat", "Hold a conversation with a model."),
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
        click.echo(self.format(record), err=True)


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
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run a command and return its exit code. An error becomes one line on stderr."""
    try:
        with log_to_stderr(verbose=False):
            result = kvswap.main(arguments, prog_name="kvswap", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except KVSwapError as error:
        return _fail(str(error), error.exit_code)
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
    except BrokenPipeError:  # whoever read stdout has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except MemoryError:
        return _fail("out of memory: use a smaller model or a shorter context", 1)


def _fail(message: str, code: int) -> int:
    sys.stdout.flush()
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End the command in order; a second signal ends it at once. KV files have no names, so none remain either way."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda number, frame: os._exit(128 + number))
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
