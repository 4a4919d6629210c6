"""A session with one turn, and commands on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvswap.cli.main import run_command

STORY = "".join(f"In chapter {number} the king of place {number} counts. " for number in range(22))


@pytest.fixture
def kv_dir(tmp_path) -> Path:
    return tmp_path / "kv"


@pytest.fixture
def command(capfd):
    """Runs a command; its exit code, stdout and stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run_command([str(word) for word in words])
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def ask(tiny, tmp_path, kv_dir, command):
    """Runs a question in a session."""
    (tmp_path / "story.txt").write_text(STORY)

    def call(question: str, *words: object, session: str = "tale") -> tuple[int, str, str]:
        base = ["run", "--model", tiny, "--ask", question, "--max-new-tokens", 5, "--kv-dir", kv_dir]
        return command(*base, "--session", session, *words)

    return call


@pytest.fixture
def tale(ask, tmp_path, kv_dir) -> Path:
    """A session with one turn; its folder."""
    assert ask("Who?", "--document", tmp_path / "story.txt")[0] == 0
    return kv_dir / "sessions" / "tale"


@pytest.fixture
def sessions(command, kv_dir):
    def call(*words: object) -> tuple[int, str, str]:
        return command("sessions", "--kv-dir", kv_dir, *words)

    return call
