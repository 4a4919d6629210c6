"""``kvswap serve`` as a process: it answers, survives a kill with its conversations, and ends in order."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from kvswap.cli.main import run_command

STORY = "".join(f"In chapter {number} the king of place {number} counts. " for number in range(30))

pytestmark = pytest.mark.usefixtures("cache_home")


class Process:
    """A server in a process of its own."""

    def __init__(self, model: Path, kv_dir: Path, *words: str) -> None:
        command = [
            sys.executable,
            "-m",
            "kvswap",
            "serve",
            "--model",
            str(model),
            "--port",
            "0",
            "--kv-dir",
            str(kv_dir),
        ]
        self.process = subprocess.Popen([*command, *words], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.said = ""
        while not (found := re.search(r"http://[\d.]+:\d+", self.said)):
            line = self.process.stderr.readline()
            assert line, self.said
            self.said += line
        self.client = httpx.Client(base_url=found[0], timeout=120)

    def ask(self, *messages: dict[str, str]) -> tuple[str, int, int]:
        found = self.client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 4}).json()
        used = found["usage"]
        text = found["choices"][0]["message"]["content"]
        return text, used["prompt_tokens"], used["prompt_tokens_details"]["cached_tokens"]

    def end(self, number: int) -> tuple[int, str]:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=60)
        return self.process.returncode, rest


@pytest.fixture
def serve(tiny: Path, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    running: list[Process] = []

    def call(*words: str) -> Process:
        running.append(Process(tiny, tmp_path / "kv", *words))
        return running[-1]

    yield call
    for each in running:
        if each.process.poll() is None:
            each.end(signal.SIGKILL)


def test_conversation_survives_a_kill(serve: Callable[..., Process]) -> None:
    question = {"role": "user", "content": STORY}
    server = serve("--alias", "mine")
    assert server.client.get("/v1/models").json()["data"][0]["id"] == "mine"
    answer, tokens, _ = server.ask(question)
    server.end(signal.SIGKILL)
    server = serve()
    turn = [question, {"role": "assistant", "content": answer}, {"role": "user", "content": "And?"}]
    _, total, cached = server.ask(*turn)
    assert cached >= tokens and total - cached < 40
    code, rest = server.end(signal.SIGTERM)
    assert code == 143 and "Traceback" not in rest


def test_ends_while_it_answers(serve: Callable[..., Process]) -> None:
    server = serve()
    body = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 1900, "stream": True}
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()  # kept, for the connection is closed when it goes
        next(line for line in lines if '"content": "' in line and '"content": ""' not in line)
        code, rest = server.end(signal.SIGINT)
    assert code == 130 and "Traceback" not in rest


def test_mistakes_are_said_before_a_model_is_loaded(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = ["serve", "--model", "./absent", "--kv-dir", str(tmp_path / "kv")]
    for words, said in (
        (["--host", "256.256.256.256"], "--host 256.256.256.256"),
        (["--api-key-file", str(tmp_path / "absent")], "--api-key-file"),
        (["--port", "0"], "./absent"),
        (["--disk-quota", "much"], "--disk-quota"),
    ):
        assert run_command([*base, *words]) == 2
        assert said in capfd.readouterr().err


def test_without_the_extra_one_line_says_what_to_install(monkeypatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("kvswap.cli.serve.NEEDED", ("starlette", "no_such_package"))
    assert run_command(["serve", "--model", "m"]) == 2
    said = capfd.readouterr().err
    assert said == "error: kvswap serve needs no_such_package; install with: pip install 'kvswap[server]'\n"
