"""The command itself: debug messages with ``-v``, warnings as notices, and a logger that is left as it was."""

from __future__ import annotations

import logging

import click
import pytest

from kvswap.cli.main import COMMANDS, kvswap, run_command
from kvswap.errors import DiskReadError


@pytest.fixture(autouse=True)
def without_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """``doctor`` without its read test, which takes seconds; it warns instead."""

    def warn(*args: object, **named: object) -> None:
        logging.getLogger("kvswap.tuning.checkup").warning("something is unusual")
        raise DiskReadError("read of 16384 bytes: EIO")

    monkeypatch.setattr("kvswap.tuning.checkup.measure_reads", warn)


@pytest.mark.parametrize("words", [["-v", "doctor"], ["--verbose", "doctor"], ["doctor", "-v"], ["-v", "doctor", "-v"]])
def test_verbose_shows_debug_messages_with_level_and_module(words, tmp_path, capfd):
    assert run_command([*words, "--kv-dir", str(tmp_path)]) == 0
    out, err = capfd.readouterr()
    lines = err.splitlines()
    found = [line for line in lines if line.startswith(f"DEBUG kvswap.tuning.checkup: checking {tmp_path} ")]
    assert len(found) == 1
    assert lines.count("WARNING kvswap.tuning.checkup: something is unusual") == 1
    assert "DEBUG" not in out


def test_without_verbose_warnings_are_notices_and_nothing_else_is_shown(tmp_path, capfd):
    assert run_command(["doctor", "--kv-dir", str(tmp_path)]) == 0
    err = capfd.readouterr().err
    assert err.splitlines().count("note: something is unusual") == 1
    assert "DEBUG" not in err and "WARNING" not in err


def test_the_logger_is_left_as_it_was(tmp_path, capfd):
    logger = logging.getLogger("kvswap")
    before = logger.level, list(logger.handlers)
    for words in (["-v", "doctor", "--kv-dir", str(tmp_path)], ["-v", "doctor", "--nothing"], ["-v", "nothing"]):
        run_command(words)
        assert (logger.level, list(logger.handlers)) == before
    capfd.readouterr()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_verbose_and_its_help_lists_it(name):
    command = kvswap.get_command(click.Context(kvswap), name)
    assert command is not None
    assert sum(parameter.name == "verbose" for parameter in command.params) == 1
    assert "--verbose" in command.get_help(click.Context(command, info_name=name))
    again = kvswap.get_command(click.Context(kvswap), name)
    assert again is not None and len(again.params) == len(command.params)
