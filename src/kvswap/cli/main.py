"""The ``kvswap`` command. Subcommands are imported when called, so that ``--help`` loads nothing heavy.

Every error on purpose ends as one line on stderr and the exit code of its class: 2 for the user's errors, 1 for faults
at run time, 130 for Ctrl-C, 143 for SIGTERM.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from kvswap.errors import KVSwapError

COMMANDS = {
    "run": ("kvswap.cli.run:run", "Ask a model about documents, with its KV cache on disk."),
    "eval": ("kvswap.cli.eval:evaluate", "Compare answers with those of full attention."),
    "profile": ("kvswap.cli.profile:profile", "Measure what this disk and a model cost."),
    "tune": ("kvswap.cli.tune:tune", "Find the parameters for a memory limit."),
    "chat": ("kvswap.cli.chat:chat", "Talk with a model, turn by turn."),
    "sessions": ("kvswap.cli.sessions:sessions", "Contexts on disk: list, check, repair, fork, export, remove."),
    "doctor": ("kvswap.cli.doctor:doctor", "Look at this machine and at the folder for KV files."),
    "bench": ("kvswap.cli.bench:bench", "Measure methods beside each other on this machine."),
}


class LazyGroup(click.Group):
    """A group whose commands are import paths until one is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"kvswap {version('kvswap')}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit."
)
def kvswap() -> None:
    """Language models over contexts whose KV cache lives on disk."""


def main() -> NoReturn:
    """Entry point: run a command and exit with its code."""
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run a command; returns its exit code, with any error told on stderr in one line."""
    try:
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
    except BrokenPipeError:  # the reader of stdout is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except MemoryError:
        return _fail("out of memory; give a smaller model or a shorter context", 1)


def _fail(message: str, code: int) -> int:
    sys.stdout.flush()
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    """The first signal unwinds in order; a second one ends at once. Files have no names, so none stay either way."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda number, frame: os._exit(128 + number))
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
