"""Write docs/command-line.md from the commands of ``kvswap``; ``make docs`` runs it.

    python docs/generate.py

The page says what ``--help`` says. A test holds the committed page to it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click

from kvswap.cli.main import kvswap

PAGE = Path(__file__).parent / "command-line.md"
INTRODUCTION = """\
# Command line

<!-- Made by docs/generate.py from the commands themselves. Edit the commands, then run: make docs -->

`kvswap COMMAND --help` prints what this page says about a command. Sizes are written like `24MiB` or `2GB`. A model is
a local directory, a `.gguf` file, a hub id such as `org/model`, or `smollm2-135m`.

Answers and tables go to stdout. Progress, notices and summaries go to stderr.

| exit code | meaning |
|--:|---|
| 0 | The command did what was asked |
| 1 | Something failed while it ran: the disk, memory, a damaged file |
| 2 | Something in the request has to change: an option, a file name, a limit. The line on stderr says what |
| 130, 143 | The command was interrupted by Ctrl-C or by SIGTERM |
"""
DEFAULT = re.compile(r"\s*\[default: (.+?)\]\s*$")


def page() -> str:
    """The whole page."""
    context = click.Context(kvswap, info_name="kvswap")
    lines = [INTRODUCTION, *options(kvswap, context), *sections(kvswap, context, level=2)]
    return "\n".join(lines).rstrip() + "\n"


def sections(group: click.Group, context: click.Context, level: int) -> Iterator[str]:
    """Lines about every command of a group, and of the groups in it."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        own = click.Context(command, info_name=name, parent=context)
        yield from section(command, own, level)
        if isinstance(command, click.Group):
            yield from sections(command, own, level + 1)


def section(command: click.Command, context: click.Context, level: int) -> Iterator[str]:
    """Heading, usage, text and options of one command."""
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield f"{'#' * level} {context.command_path}\n"
    yield from fenced([usage])
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        yield from text(paragraph)
    yield from options(command, context)


def options(command: click.Command, context: click.Context) -> Iterator[str]:
    """The table of a command's options, or nothing."""
    found = [each for each in command.get_params(context) if isinstance(each, click.Option) and not is_help(each)]
    if found:
        yield "| option | default | meaning |\n|---|---|---|"
        yield from (row(option) for option in found)
        yield ""


def text(paragraph: str) -> Iterator[str]:
    """A paragraph of help; one that begins with click's mark for text as it is holds examples."""
    if not paragraph.startswith("\b"):
        yield " ".join(paragraph.split()) + "\n"
        return
    first, *rest = paragraph.removeprefix("\b\n").splitlines()
    yield f"{first}\n"
    yield from fenced([line.strip() for line in rest], "console", prompt="$ ")


def fenced(lines: list[str], language: str = "text", prompt: str = "") -> Iterator[str]:
    """A block of code."""
    yield "\n".join([f"```{language}", *(prompt + line for line in lines), "```\n"])


def row(option: click.Option) -> str:
    """One row of the table: names with the kind of value, default, help."""
    help_text = option.help or ""
    stated = DEFAULT.search(help_text)
    meaning = DEFAULT.sub("", help_text)
    value = f" {option.metavar}" if option.metavar and not option.is_flag else ""
    names = sorted(option.opts, key=lambda name: not name.startswith("--"))
    name = ", ".join(f"`{each}{value}`" for each in names)
    meaning = cell(meaning)
    if isinstance(option.type, click.Choice):
        meaning += f" One of {', '.join(f'`{choice}`' for choice in option.type.choices)}."
    if option.multiple and "several times" not in meaning:
        meaning += " May be given several times."
    return f"| {name} | {default_of(option, stated[1] if stated else '')} | {meaning} |"


def default_of(option: click.Option, stated: str) -> str:
    """What happens without the option."""
    if option.required:
        return "required"
    if stated:
        return cell(stated)
    if option.is_flag:
        return "off"
    value = option.default
    return f"`{value}`" if isinstance(value, str | int | float) and value != "" else "none"


def cell(words: str) -> str:
    """Text that may stand in a table."""
    return re.sub(r"([|*<])", r"\\\1", " ".join(words.split()))


def is_help(option: click.Option) -> bool:
    """Whether this is ``--help``, which every command has."""
    return "--help" in option.opts


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
