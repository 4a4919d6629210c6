"""``kvswap chat``: turns, commands and mistakes, with lines that come from a pipe."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from kvswap.cli.main import run_command

pytestmark = pytest.mark.usefixtures("cache_home")


@pytest.fixture
def chat(tiny, tmp_path, capfd, monkeypatch):
    """Types lines into a chat; its exit code, stdout and stderr."""

    def call(*lines: str, words: tuple[str, ...] = ("--session", "diary")) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        base = ["chat", "--model", tiny, "--kv-dir", tmp_path / "kv", "--max-new-tokens", 4]
        capfd.readouterr()
        code = run_command([*map(str, base), *words])
        return code, *capfd.readouterr()

    return call


def test_turns_are_kept_and_taken_back(chat, tmp_path) -> None:
    code, out, err = chat(
        "Who is there?", "", "/save", "And who not?", "/stats", "/fork other", "/undo", "/quit", "never"
    )
    assert code == 0 and out.count("\n") == 2
    assert "tokens are on disk in" in err and "first token" in err and "taken back" in err
    assert sorted(path.name for path in (tmp_path / "kv" / "sessions").iterdir()) == [".usage", "diary", "other"]
    code, again, err = chat("And who not?")
    assert "session diary goes on" in err
    assert again == out.split("\n", 1)[1]
    assert chat("And then?", words=("--session", "other"))[0] == 0


def test_mistakes_do_not_end_the_chat(chat) -> None:
    code, out, err = chat("/nonsense", "/fork", "/undo", "/fork ../x", "/help", "Who?")
    assert code == 0 and out.count("\n") == 1
    assert err.count("error: ") == 4 and "use one of /stats, /undo, /fork NAME" in err


def test_without_a_session(chat, tmp_path) -> None:
    code, out, err = chat("Who?", "/undo", "/save", words=())
    assert code == 0 and out.count("\n") == 1
    assert err.count("start it with --session NAME") == 1 and "load with session=NAME" in err
    assert not (tmp_path / "kv" / "sessions").exists()


def test_document_comes_before_the_first_question(chat, tmp_path) -> None:
    story = Path(tmp_path / "story.txt")
    story.write_text("Once upon a time. " * 30)
    code, _, err = chat("Who?", "/stats", words=("--document", str(story)))
    assert code == 0 and "tokens in" in err
    assert chat("Who?", words=("--document", "absent.txt"))[0] == 2


def test_options_of_run(chat, tmp_path, monkeypatch) -> None:
    """The same ones, to the same effect: they reach the engine."""
    (tmp_path / "config.json").write_text('{"group_tokens": 8}')
    monkeypatch.setenv("KVSWAP_SESSION_KEY", "5c" * 32)
    words = ("--session", "diary", "--encrypt", "--config", str(tmp_path / "config.json"), "--dtype", "float32")
    words += ("--no-verify", "--no-mmap", "--check-quality")
    code, out, err = chat("Who is there, and what does he count in the evening?", "/stats", words=words)
    assert code == 0 and out.count("\n") == 1 and "first token" in err
    from kvswap.sessions.shelf import open_session

    with open_session(str(tmp_path / "kv"), "diary", write=False) as folder:
        assert folder.manifest.encryption is not None and folder.manifest.layout.group_tokens == 8
    assert chat("Who?", words=("--encrypt",))[0] == 2
    assert chat("Who?", words=("--config", str(tmp_path / "absent.json")))[0] == 2


def test_chat_takes_what_run_takes() -> None:
    from kvswap.cli.chat import chat as chat_command
    from kvswap.cli.run import run

    names = {parameter.opts[0] for parameter in run.params} - {"--ask", "--method", "--stats-json"}
    assert names == {parameter.opts[0] for parameter in chat_command.params}


def test_a_terminal_without_line_editing_is_told_what_to_install(tiny, capfd, monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal("never read\n"))
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    assert run_command(["chat", "--model", str(tiny)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "pip install 'kvswap[chat]'" in err
