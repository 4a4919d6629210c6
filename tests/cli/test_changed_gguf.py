"""A GGUF file that changes while its weights are mapped is an error between two steps, whatever is computed with it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import kvswap
import kvswap.lab.bench.run
from kvswap.cli.main import run_command
from kvswap.errors import ModelError
from kvswap.models.loading import load_model
from kvswap.models.mapped import _Watch
from kvswap.native.library import available
from tests.cli.conftest import check_refused

pytestmark = [
    pytest.mark.skipif(not available(), reason="nothing was compiled here"),
    pytest.mark.usefixtures("cache_home"),
]
CHANGED = "the file was changed while it was in use; load the model again"


def write_over(file: Path) -> None:
    """Let a file be another one as far as the system says, with bytes that can still be read."""
    os.utime(file, ns=(1, 1))


@pytest.fixture
def changing(file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that changes as soon as a command has loaded it."""

    def load(*arguments: Any, **options: Any) -> Any:
        loaded = load_model(*arguments, **options)
        write_over(file)
        return loaded

    monkeypatch.setattr("kvswap.models.loading.load_model", load)
    return file


@pytest.mark.parametrize(
    "command",
    [
        ["run", "--ask", "Who?"],
        ["bench", "--json", "found.json", "--context", "64", "--new-tokens", "2"],
        ["eval", "--json", "found.json", "--context", "64", "--steps", "2", "--samples", "1"],
        ["tune", "--out", "found.json", "--context", "1024", "--kv-memory", "4MiB"],
        ["profile", "--json", "found.json"],
    ],
    ids=lambda words: words[0],
)
def test_every_command_notices(
    command: list[str], changing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kvswap.tuning.profile.measure_disk", lambda *_, **__: None)
    quick = partial(kvswap.lab.bench.run.measure_reads, file_bytes=1 << 20, read_s=0.1)
    monkeypatch.setattr("kvswap.lab.bench.run.measure_reads", quick)
    code = run_command([*command, "--model", str(changing), "--kv-dir", "kv"])
    said = [line for line in capfd.readouterr().err.splitlines() if "%" not in line]
    check_refused(code, "\n".join(said))
    assert CHANGED in said[0] and not Path("found.json").exists()


def test_a_chat_notices_between_questions(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    class Lines(io.StringIO):
        def __iter__(self) -> Iterator[str]:
            yield "Who?"
            write_over(file)
            yield "And who not?"

    monkeypatch.setattr("sys.stdin", Lines())
    words = ["chat", "--model", file, "--kv-dir", tmp_path / "kv", "--max-new-tokens", 2, "--session", "diary"]
    assert run_command([str(word) for word in words]) == 0
    out, err = capfd.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and CHANGED in errors[0] and out.count("\n") == 1


def test_an_answer_notices_in_its_middle_and_is_taken_back(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kvswap.load(str(file), kv_dir=str(tmp_path / "kv"), session="tale") as engine:
        list(engine.ask("Who?", max_new_tokens=2))
        assert engine.session is not None
        before, forwards, look = engine.session.token_ids, [0], _Watch.__call__

        def change_later(*arguments: Any) -> None:
            forwards[0] += 1
            if forwards[0] == 3:  # the prompt and a token are computed
                write_over(file)
            look(*arguments)

        monkeypatch.setattr(_Watch, "__call__", change_later)
        with pytest.raises(ModelError, match="was changed while it was in use"):
            list(engine.ask("And who not?", max_new_tokens=20))
        assert forwards == [3] and engine.session.token_ids == before
        with pytest.raises(ModelError, match="was changed while it was in use"):
            list(engine.ask("Who?"))


def test_what_was_copied_may_change(file: Path, tmp_path: Path) -> None:
    loaded = load_model(str(file), mmap=False)
    write_over(file)
    loaded.check_weights()
    with kvswap.load(loaded, kv_dir=str(tmp_path / "kv")) as engine:
        list(engine.ask("Who?", max_new_tokens=2))


def test_truncation_between_calls_ends_no_process(file: Path, tmp_path: Path) -> None:
    """In a process of its own, which the system would end at the first page that is gone."""
    script = """
        import json, os, sys, torch, kvswap
        file, kv_dir, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
        whole, found = open(file, "rb").read(), {}

        def attempt(name, call):
            # as if the file were copied over: shorter for a moment, and the same again
            os.truncate(file, size)
            try:
                call()
                found[name] = "went on"
            except kvswap.ModelError as error:
                found[name] = str(error)
            open(file, "wb").write(whole)

        engine = kvswap.load(file, kv_dir=kv_dir)
        list(engine.ask("Who?", max_new_tokens=2))
        attempt("engine", lambda: list(engine.ask("Who?", max_new_tokens=2)))
        engine.close()
        session = kvswap.Session.create("tale", file, kvswap.Config(kv_dir=kv_dir), prompt="Once upon a time")
        attempt("append", lambda: session.append(" there was"))
        attempt("generate", lambda: list(session.generate(max_new_tokens=2)))
        session.close()
        loaded = kvswap.load_model(file)
        attempt("load", lambda: kvswap.load(loaded, kv_dir=kv_dir))
        loaded = kvswap.load_model(file)
        attempt("open", lambda: kvswap.Session.open("tale", loaded, kvswap.Config(kv_dir=kv_dir)))
        loaded = kvswap.load_model(file)
        with kvswap.attach(loaded.model, tokenizer=loaded.tokenizer, kv_dir=kv_dir) as cache:
            ids = torch.arange(2, 40)[None]
            attempt("generate of transformers", lambda: loaded.model.generate(ids, max_new_tokens=2, cache=cache))
        loaded = kvswap.load_model(file)
        attempt("tune", lambda: kvswap.tune(loaded, kv_memory="4MiB", context_tokens=1024, kv_dir=kv_dir))
        print(json.dumps(found))
    """
    words = [sys.executable, "-c", textwrap.dedent(script), str(file), str(tmp_path / "kv"), "4096"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == 7
    for name, said in found.items():
        assert CHANGED in said, name
