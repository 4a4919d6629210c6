"""Whatever words and lines a user types: an exit code, at most short errors, and never a traceback or a log of one.

Models are not loaded here: loading raises an error in its place, after every option was read.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvswap.cli.main import run_command
from kvswap.errors import ModelError

WORDS = st.sampled_from(["", " ", "-", "--", "~", "~no-such-user/x", "@", "\udcff", "caf\udce9", "\x1b[2J", "é" * 90])
NUMBERS = st.sampled_from(
    ["0", "1", "-1", "64", "1e-40", "1e400", "nan", "inf", "-inf", "9" * 30, "9" * 5000, "0x10", "\u0661", "\xb2"]
)
SIZES = st.sampled_from(["1MiB", "24MiB", "0", "-1", "1e9GiB", "9" * 400, "9" * 400 + "GiB", "1.5.5MiB", "MiB", "auto"])
FILES = st.sampled_from(
    ["a.txt", "a.pdf", "bad.txt", "config.json", "deep.json", "big.json", "tuned.json", "folder", "none", "folder/x"]
)
TEXTS = st.text(st.characters(exclude_characters="/\0"), max_size=12).filter(lambda text: ".." not in text)
VALUES = st.one_of(WORDS, NUMBERS, SIZES, FILES, TEXTS)
WEIGHTS = st.sampled_from(["auto", "float", "q8", "q4", "Q4_K", ""])

SHARED = {
    "--model": st.just("model"),
    "--document": FILES | WORDS,
    "--kv-memory": SIZES | VALUES,
    "--kv-dir": st.sampled_from(["kv", "a.txt", "folder/kv", "~no-such-user/x", "x" * 300]),
    "--max-new-tokens": NUMBERS,
    "--temperature": NUMBERS,
    "--top-p": NUMBERS,
    "--seed": NUMBERS,
    "--dtype": st.sampled_from(["auto", "float32", "int8", ""]),
    "--config": FILES | WORDS,
    "--session": WORDS | TEXTS | st.just("tale"),
    "--disk-quota": SIZES | VALUES,
    "--write-limit": SIZES | VALUES,
    "--encrypt": None,
    "--no-mmap": None,
    "--no-verify": None,
    "--weights": WEIGHTS,
    "--check-quality": None,
    "-v": None,
}
OPTIONS = {
    "run": {**SHARED, "--ask": VALUES, "--method": st.sampled_from(["kvswap", "full", "magic"]), "--stats-json": FILES},
    "chat": SHARED,
    "eval": {
        "--model": st.just("model"),
        "--task": st.sampled_from(["agreement", "needle", "longbench", "", ",", "x"]),
        "--methods": st.sampled_from(["full,kvswap", "window", "", "magic"]),
        "--context": NUMBERS,
        "--kv-memory": SIZES,
        "--setting": st.sampled_from(["tight", "relaxed", "tight:8", "tight:x", "tight:" + "9" * 30, ""]),
        "--samples": NUMBERS,
        "--texts": NUMBERS,
        "--steps": NUMBERS,
        "--minutes": NUMBERS,
        "--seed": NUMBERS,
        "--document": FILES | WORDS,
        "--dataset": FILES | WORDS,
        "--json": FILES | WORDS,
        "--plot": FILES | st.just("a.png"),
        "--config": FILES,
        "--weights": WEIGHTS,
        "--no-mmap": None,
    },
    "bench": {
        "--model": st.just("model"),
        "--context": NUMBERS,
        "--methods": st.sampled_from(
            ["all", "kvswap", "kvswap@config.json", "kvswap@", "full@a.txt", "kvswap@~nobody/x"]
        ),
        "--batch": NUMBERS,
        "--kv-memory": SIZES,
        "--new-tokens": NUMBERS,
        "--repeat": NUMBERS,
        "--label": TEXTS,
        "--json": FILES | WORDS,
        "--config": FILES,
        "--weights": WEIGHTS,
        "--no-mmap": None,
    },
    "tune": {
        "--model": st.just("model"),
        "--kv-memory": SIZES,
        "--context": NUMBERS,
        "--batch": NUMBERS,
        "--out": FILES | WORDS,
        "--profile": FILES,
        "--tables": FILES,
        "--weights": WEIGHTS,
        "--no-mmap": None,
    },
    "profile": {
        "--model": st.just("model"),
        "--kv-dir": st.sampled_from(["kv", "a.txt", "~no-such-user/x"]),
        "--json": FILES | WORDS,
        "--plot": FILES | st.just("a.png"),
        "--weights": WEIGHTS,
        "--no-mmap": None,
    },
    "sessions": {
        word: None
        for word in (
            "list",
            "show",
            "check",
            "repair",
            "fork",
            "rm",
            "wipe",
            "prune",
            "export",
            "import",
            "--json",
            "--quarantine",
            "-v",
        )
    }
    | {"--name": WORDS | TEXTS, "--kv-dir": st.sampled_from(["kv", "a.txt", "~no-such-user/x"])},
}
REQUIRED = {
    "run": ("--model", "--ask"),
    "chat": ("--model",),
    "eval": ("--model", "--json"),
    "bench": ("--model", "--json"),
    "tune": ("--model", "--kv-memory", "--context", "--out"),
    "profile": ("--model",),
    "sessions": (),
}


@st.composite
def commands(draw: st.DrawFn) -> list[str]:
    """A command with some of its options, most of them with values that it has; sometimes any words."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.lists(VALUES | st.sampled_from(["run", "--ask", "-v", "--help", "--version"]), max_size=6))
    name = draw(st.sampled_from(sorted(OPTIONS)))
    options = OPTIONS[name]
    chosen = [*REQUIRED[name], *draw(st.lists(st.sampled_from(sorted(options)), max_size=5))]
    words = [name, *(["--kv-dir", "kv"] if name in ("sessions", "eval", "bench", "tune") else [])]
    for option in chosen:
        values = options[option]
        words += [option] if values is None else [option, draw(values)]
    if name == "sessions":
        words += draw(st.lists(st.just("tale") | FILES | WORDS | TEXTS, max_size=3))
    return words


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with files of many kinds, and no model that can be loaded."""

    def refuse(*args: object, **options: object) -> None:
        raise ModelError("model: not loaded in this test", hint="end here")

    from tests.app.test_documents import pdf

    monkeypatch.setattr("kvswap.cli.loading.load_weights", refuse)
    monkeypatch.setenv("KVSWAP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KVSWAP_SESSION_KEY", "5c" * 32)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name, content in {
        "a.txt": b"Once upon a time.\r\n",
        "a.pdf": b"\n" + pdf("It is decided."),
        "bad.txt": b"caf\xe9",
        "config.json": b'{"select_tokens": 200}',
        "deep.json": b"[" * 50_000,
        "big.json": b'{"select_tokens": 1' + b"0" * 4000 + b', "kv_dir": "a\\u0000b", "read_gap_bytes": 1e400}',
        "tuned.json": b'{"format": "kvswap-tuned", "version": 2, "solutions": [{"values": {"x": "\\ud800"}}]}',
    }.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@contextlib.contextmanager
def captured(lines: str = "") -> Iterator[tuple[io.StringIO, io.StringIO]]:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("sys.stdin", io.StringIO(lines))
        yield out, err


def fuzz(cases: int) -> None:
    @settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck))
    @given(commands())
    def any_words(words: list[str]) -> None:
        with captured() as (out, err):
            code = run_command(words)
        said = err.getvalue()
        assert code in (0, 1, 2)
        assert "the log is in" not in said, said
        assert "-v" in words or "Traceback" not in said, said
        assert not set(said + out.getvalue()) & set("\x1b\x07\x00")
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) <= 1 and (errors or code != 2 or not words)

    any_words()


def test_any_words(here: Path) -> None:
    fuzz(60)


@pytest.mark.slow
def test_any_words_2000_times(here: Path) -> None:
    fuzz(2_000)


# ---- the lines of a chat

LINES = st.one_of(
    st.sampled_from(["/stats", "/undo", "/fork", "/fork a", "/save", "/help", "//", "/", "/x y", "/tmp/a is what?"]),
    st.text(st.characters(exclude_characters="\n"), max_size=20),
    st.binary(max_size=8).map(lambda data: data.replace(b"\n", b"").decode("utf-8", "surrogateescape")),
)


def chat_fuzz(tiny: Path, cases: int) -> None:
    from kvswap.app.engine import Engine
    from kvswap.cli.chat import _converse
    from kvswap.cli.display import Display
    from kvswap.config import Config
    from kvswap.models.loading import load_model

    loaded = load_model(str(tiny))

    @settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(LINES, max_size=5))
    def any_lines(lines: list[str]) -> None:
        with tempfile.TemporaryDirectory(dir=os.getcwd()) as folder:
            config = Config(kv_dir=folder, kv_memory="4MiB")
            with Engine(loaded, config) as engine, captured("\n".join([*lines, "Who?"])) as (_, err):
                _converse(engine, Display(), [], {"max_new_tokens": 1})
                assert engine.stats.new_tokens == 1  # the last line was answered
        assert "Traceback" not in err.getvalue()

    any_lines()


def test_any_lines_of_a_chat(tiny: Path, cache_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chat_fuzz(tiny, 15)


@pytest.mark.slow
def test_any_lines_of_a_chat_2000_times(
    tiny: Path, cache_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chat_fuzz(tiny, 2_000)
