"""``kvswap chat``: turns, commands and mistakes, with lines that come from a pipe."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path

import pytest

from kvswap.cli.main import run_command
from kvswap.sessions.catalog import open_store

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
    assert "session diary continues with" in err
    assert again == out.split("\n", 1)[1]
    assert chat("And then?", words=("--session", "other"))[0] == 0


def test_mistakes_do_not_end_the_chat(chat) -> None:
    code, out, err = chat("/nonsense", "/fork", "/undo", "/fork ../x", "/help", "Who?")
    assert code == 0 and out.count("\n") == 1
    assert err.count("error: ") == 4 and "use one of /stats, /sources, /undo, /fork NAME" in err


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


def test_document_that_a_session_has_is_not_added_again(chat, tmp_path) -> None:
    story, more = tmp_path / "story.txt", tmp_path / "more.txt"
    story.write_text("Once upon a time. " * 30)
    more.write_text("Another day. " * 30)
    words = ("--session", "diary", "--document", str(story))
    assert chat("Who?", words=words)[0] == 0
    before = len(stored_ids(tmp_path))
    code, _, err = chat("And?", words=words)
    assert code == 0 and "the documents are part of it already" in err
    assert len(stored_ids(tmp_path)) < before + 100
    code, _, err = chat("And now?", words=(*words, "--document", str(more)))
    assert code == 0 and "part of it already" not in err


def stored_ids(tmp_path: Path) -> list[int]:
    with open_store(str(tmp_path / "kv"), "diary", write=False) as store:
        contents = store.load(tail_only=True)
    assert contents is not None
    return contents.ids


def test_options_of_run(chat, tmp_path, monkeypatch) -> None:
    """The same ones, to the same effect: they reach the engine."""
    (tmp_path / "config.json").write_text('{"group_tokens": 8}')
    monkeypatch.setenv("KVSWAP_SESSION_KEY", "5c" * 32)
    words = ("--session", "diary", "--encrypt", "--config", str(tmp_path / "config.json"), "--dtype", "float32")
    words += ("--no-verify", "--no-mmap", "--check-quality")
    code, out, err = chat("Who is there, and what does he count in the evening?", "/stats", words=words)
    assert code == 0 and out.count("\n") == 1 and "first token" in err
    from kvswap.sessions.catalog import open_store

    with open_store(str(tmp_path / "kv"), "diary", write=False) as store:
        assert store.manifest.encryption is not None and store.manifest.layout.group_tokens == 8
    assert chat("Who?", words=("--encrypt",))[0] == 2
    assert chat("Who?", words=("--config", str(tmp_path / "absent.json")))[0] == 2


@pytest.mark.parametrize("installed", [True, False])
def test_terminal_needs_no_prompt_toolkit(installed, chat, monkeypatch) -> None:
    """With it lines can be edited; without it they are read as they are, which is said once."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    class PromptSession:
        def prompt(self, prompt: str) -> str:
            assert prompt == "> "
            return input()

    module = types.ModuleType("prompt_toolkit")
    module.PromptSession = PromptSession
    monkeypatch.setitem(sys.modules, "prompt_toolkit", module if installed else None)
    monkeypatch.setattr(io, "StringIO", Terminal)
    code, out, err = chat("Who?", "", "/stats", words=())
    assert code == 0 and out.count("\n") == 1 and "first token" in err
    assert err.count("pip install 'kvswap[chat]'") == (0 if installed else 1)


def test_chat_takes_what_run_takes() -> None:
    from kvswap.cli.chat import chat as chat_command
    from kvswap.cli.run import run

    names = {parameter.opts[0] for parameter in run.params} - {"--ask", "--method", "--stats-json"}
    assert names == {parameter.opts[0] for parameter in chat_command.params}


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The questions that reach the engine."""
    from kvswap.app.engine import Engine

    found: list[str] = []
    real = Engine.ask

    def ask(self: Engine, question: str, *args: object, **options: object) -> object:
        found.append(question)
        return real(self, question, *args, **options)

    monkeypatch.setattr(Engine, "ask", ask)
    return found


def test_lines_that_begin_with_a_path_are_questions(chat, asked) -> None:
    lines = ["/etc/hosts says what?", "/tmp/a.txt", "//tmp is full", "  //undo", "///", "/2026 or /2025?"]
    code, _, err = chat(*lines, words=())
    assert code == 0 and err.count("error: ") == 0
    assert asked == ["/etc/hosts says what?", "/tmp/a.txt", "/tmp is full", "/undo", "//", "/2026 or /2025?"]
    code, _, err = chat("/tmp is full", "/", "/quit now", "/help", words=())
    assert code == 0 and err.count("a question that begins with / is written with //") == 3
    assert len(asked) == 6 and "//..." in err


def test_bytes_that_are_not_utf8_cost_one_line(chat, tiny, tmp_path, monkeypatch, capfd) -> None:
    lines = b"Who?\ncaf\xe9\n\xff\xfe\n/fork \xff\nCaf\xc3\xa9?\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    capfd.readouterr()
    code = run_command(["chat", "--model", str(tiny), "--kv-dir", str(tmp_path / "kv"), "--max-new-tokens", "4"])
    out, err = capfd.readouterr()
    assert code == 0 and out.count("\n") >= 2
    assert err.count("error: the question is not UTF-8 text") == 2
    assert err.count("error: ") == 3 and "Traceback" not in err
