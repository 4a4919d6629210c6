"""A session with one turn, commands on it, and a GGUF file that runs."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from kvswap.cli.main import run_command
from tests.helpers.families import tiny_model
from tests.helpers.packed import write_model

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


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> bytes:
    """A GGUF file that runs."""
    path = tmp_path_factory.mktemp("sound") / "tiny.gguf"
    return write_model(path, tiny_model("llama", vocab_size=300), gguf.GGMLQuantizationType.Q8_0).read_bytes()


@pytest.fixture
def file(sound, tmp_path) -> Path:
    """The same on disk, to be damaged."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(sound)
    return path


def check_refused(code: int, said: str) -> None:
    """See that a command was refused with one line that has a hint; ``said`` is stderr without progress."""
    assert code == 2, said
    assert said.startswith("error: ") and "\n" not in said, said
    what, _, hint = said.partition("; ")
    assert hint and not what.endswith((".", ":")), said
    assert "log is in" not in said and "Traceback" not in said
