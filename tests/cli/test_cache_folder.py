"""With --kv-dir nothing else has to be writable: no home folder, or one that takes no files, costs a notice at most."""

from __future__ import annotations

import errno
import os
import pwd
from collections.abc import Callable
from pathlib import Path

import pytest

from kvswap.cli.main import run_command
from kvswap.core import calibration
from kvswap.disk import atomic

NAMES = ("KVSWAP_HOME", "XDG_CACHE_HOME", "HOME")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "CALIBRATION_TOKENS", 512)


def homeless(patch: pytest.MonkeyPatch, home: Path) -> None:
    """A user whom the system does not know, as in a container that runs under a number."""

    def unknown(uid: int) -> object:
        raise KeyError(uid)

    for name in NAMES:
        patch.delenv(name, raising=False)
    patch.setattr(pwd, "getpwuid", unknown)


def a_file(patch: pytest.MonkeyPatch, home: Path) -> None:
    home.touch()


def refusing(number: int) -> Callable[[pytest.MonkeyPatch, Path], None]:
    """A cache folder that answers every new file with this error; other folders are as ever."""

    def prepare(patch: pytest.MonkeyPatch, home: Path) -> None:
        real_open, real_mkdir = os.open, os.mkdir

        def refuse(path: object) -> None:
            if isinstance(path, str | os.PathLike) and Path(path).is_relative_to(home):
                raise OSError(number, os.strerror(number), str(path))

        def open_(path: object, flags: int, *args: object, **named: object) -> int:
            if flags & os.O_CREAT:
                refuse(path)
            return real_open(path, flags, *args, **named)

        def mkdir(path: object, *args: object, **named: object) -> None:
            refuse(path)
            real_mkdir(path, *args, **named)

        patch.setattr(os, "open", open_)
        patch.setattr(os, "mkdir", mkdir)
        patch.setattr(atomic.os, "open", open_)

    return prepare


TROUBLES = {
    "no home": homeless,
    "a file": a_file,
    "read-only": refusing(errno.EROFS),
    "forbidden": refusing(errno.EACCES),
    "full": refusing(errno.ENOSPC),
}


@pytest.fixture(params=TROUBLES)
def trouble(request: pytest.FixtureRequest, tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVSWAP_HOME", str(tmp_path / "home"))
    TROUBLES[request.param](monkeypatch, tmp_path / "home")


def test_run_needs_only_the_folder_it_is_given(trouble: None, tiny: Path, tmp_path: Path, capfd) -> None:
    (tmp_path / "story.txt").write_text("Once upon a time. " * 20)
    base = ["run", "--model", tiny, "--kv-dir", tmp_path / "kv", "--ask", "Who?", "--max-new-tokens", 2]
    for words in ([], ["--document", tmp_path / "story.txt", "--session", "tale"], ["--method", "full"]):
        assert run_command([str(word) for word in [*base, *words]]) == 0
        err = capfd.readouterr().err
        assert "error: " not in err
        assert err.count("the calibration cannot be stored") == (0 if "full" in words else 1)
    assert run_command(["sessions", "--kv-dir", str(tmp_path / "kv"), "check"]) == 0
    assert "tale: sound" in capfd.readouterr().out


def test_without_kv_dir_it_fails_at_once_and_says_what_to_set(trouble: None, tiny: Path, capfd) -> None:
    for words in (["run", "--model", str(tiny), "--ask", "Who?"], ["chat", "--model", str(tiny), "--session", "a"]):
        assert run_command(words) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("error: ") and "--kv-dir" in line and "KVSWAP_HOME" in line


@pytest.mark.parametrize("words", [["sessions", "list"], ["sessions", "prune"]])
def test_reading_commands_end_in_order(words: list[str], trouble: None, capfd) -> None:
    assert run_command(words) in (0, 2)
    assert "the log is in" not in capfd.readouterr().err
