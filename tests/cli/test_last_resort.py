"""Whatever a command raises, the user gets one line, an exit code and a log: never a traceback, unless asked for."""

from __future__ import annotations

import errno
import importlib
import os
import pkgutil
import re
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path

import pytest

import kvswap
from kvswap.cli import last_resort
from kvswap.cli.main import COMMANDS, run_command

ERRORS = (
    RuntimeError("the size of tensor a\nmust match"),
    AssertionError(),
    KeyError("q_proj"),
    RecursionError("maximum recursion depth exceeded"),
    UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"),
    OSError(errno.EIO, os.strerror(errno.EIO), "/somewhere/file"),
    OSError("no number"),
    ImportError("this needs a package \x1b[31m of its own"),
    ExceptionGroup("several", [ValueError("one"), TypeError("two")]),
)


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("KVSWAP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def everything() -> None:
    """All modules are loaded, so that none keeps what is put in a function's place for one test."""
    for each in pkgutil.walk_packages(kvswap.__path__, "kvswap."):
        if not each.name.endswith(("__main__", "._kernels")):
            importlib.import_module(each.name)


@pytest.fixture
def broken(everything: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Every way into a command raises the given error."""

    def prepare(error: BaseException) -> list[list[str]]:
        def fail(*args: object, **named: object) -> None:
            raise error

        for target in (
            "kvswap.app.prompt.make_request",
            "kvswap.cli.display.Display.__init__",
            "kvswap.disk.files.prepare_dir",
            "kvswap.sessions.catalog.entries",
            "kvswap.tuning.checkup.check_up",
        ):
            monkeypatch.setattr(target, fail)
        here, model = ["--kv-dir", str(tmp_path / "kv")], ["--model", str(tmp_path)]
        results = ["--json", str(tmp_path / "results.json")]
        return [
            ["run", *model, "--ask", "Who?"],
            ["chat", *model],
            ["eval", *model, *results],
            ["bench", *model, *results],
            ["profile", *here],
            ["tune", *model, "--kv-memory", "24MiB", "--context", "4096", "--out", str(tmp_path / "tuned.json")],
            ["sessions", *here, "list"],
            ["doctor", *here],
            ["serve", *model, *here],
        ]

    return prepare


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_command_ends_with_one_line_that_names_its_log(error, broken, home, capfd) -> None:
    commands = broken(error)
    assert {words[0] for words in commands} == set(COMMANDS)
    for words in commands:
        assert run_command(words) == 1
        out, err = capfd.readouterr()
        (line,) = err.splitlines()
        assert out == "" and line.startswith("error: ") and "\x1b" not in line and "Traceback" not in line
        assert f"kvswap {words[0]} failed while " in line and "--verbose shows" in line
        log = Path(re.search(r"the log is in (\S+\.log)", line)[1])
        assert log.parent == home / "logs" and stat.S_IMODE(log.stat().st_mode) == 0o600
        content = log.read_text()
        assert "Traceback" in content and type(error).__name__ in content and repr(words) in content


def test_verbose_shows_the_traceback_before_the_line(broken, capfd) -> None:
    for words in broken(RuntimeError("odd")):
        for given in (["-v", *words], [*words, "-v"] if words[0] != "sessions" else ["sessions", "-v", *words[1:]]):
            assert run_command(given) == 1
            err = capfd.readouterr().err
            assert "Traceback" in err and "RuntimeError: odd" in err and err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("trouble", ["file", "homeless", "nowhere"])
def test_log_without_a_cache_folder(trouble, broken, home, tmp_path, monkeypatch, capfd) -> None:
    def no_home() -> Path:
        raise RuntimeError("no home")

    (tmp_path / "temporary").mkdir()
    if trouble == "homeless":
        monkeypatch.setattr(last_resort, "logs_folder", no_home)
    else:
        home.touch()
    if trouble == "nowhere":
        monkeypatch.setattr(last_resort, "_folders", lambda: [home / "logs", home / "none"])
    else:
        temporary = types.SimpleNamespace(gettempdir=lambda: tmp_path / "temporary", mkstemp=tempfile.mkstemp)
        monkeypatch.setattr(last_resort, "tempfile", temporary)
    assert run_command(broken(RuntimeError("odd"))[0]) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert ("no log could be written" in err) == (trouble == "nowhere")
    assert len(os.listdir(tmp_path / "temporary")) == (0 if trouble == "nowhere" else 1)


def test_old_logs_go(broken, home, capfd) -> None:
    words = broken(RuntimeError("odd"))[-1]
    for _ in range(last_resort.KEPT_LOGS + 3):
        assert run_command(words) == 1
    assert len(os.listdir(home / "logs")) == last_resort.KEPT_LOGS


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_out_of_memory_says_so(error, broken, home, capfd) -> None:
    assert run_command(broken(error)[-1]) == 1
    assert capfd.readouterr().err == "error: out of memory: use a smaller model or a shorter context\n"


def test_message_says_what_was_being_done(tmp_path, monkeypatch, capfd) -> None:
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr("kvswap.app.documents._plain_text", lambda *args: 1 / 0)
    assert run_command(["run", "--model", "m", "--ask", "Who?", "--document", str(tmp_path / "a.txt")]) == 1
    assert "failed while reading a document: ZeroDivisionError" in capfd.readouterr().err


def test_threads_and_finalizers_show_no_traceback(home, monkeypatch, capfd) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    lines: list[str] = []
    last_resort.install(lines.append, ["run"])

    class Odd:
        def __del__(self) -> None:
            raise RuntimeError("finalizer")

    def work() -> None:
        del Odd.kept
        raise RuntimeError("thread")

    Odd.kept = Odd()
    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert len(lines) == 1 and "RuntimeError: thread; the log is in" in lines[0]
    assert capfd.readouterr().err == ""


# ---- in a process of its own


def shell(script: str) -> subprocess.CompletedProcess[bytes]:
    words = f"{sys.executable} -W error -m kvswap"
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # as users have it: what is not written yet fails at the end
    return subprocess.run(
        ["bash", "-c", script.replace("KVSWAP", words)], capture_output=True, check=False, timeout=60, env=buffered
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("words", ["--version", "--help", "run --help", "sessions --kv-dir kv list", "sessions key"])
def test_streams_that_take_nothing(words, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    full = shell(f"KVSWAP {words} >/dev/full")
    assert full.returncode == 1 and b"No space left" in full.stderr and full.stderr.count(b"\n") == 1
    for redirect in ("2>/dev/full", ">/dev/full 2>/dev/full", ">&-", "2>&-", "<&-", "<&- >&- 2>&-"):
        found = shell(f"KVSWAP {words} {redirect}")
        assert found.returncode in (0, 1) and b"Traceback" not in found.stderr and b"Exception" not in found.stderr
    ended = shell(f"trap '' PIPE; KVSWAP {words} | true; exit ${{PIPESTATUS[0]}}")
    assert ended.returncode in (0, 1, 128 + signal.SIGPIPE) and b"Traceback" not in ended.stderr


def test_text_that_stdout_cannot_encode(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii:strict")
    (tmp_path / "kv").mkdir()
    found = shell("KVSWAP sessions --kv-dir kv/été list")
    assert found.returncode == 0 and found.stdout.startswith(b"no sessions in ") and found.stderr == b""
    found = shell("KVSWAP sessions --kv-dir $'kv/\\xff' list")
    assert found.returncode == 0 and found.stderr == b""
