"""One place decides where files lie: KVSWAP_HOME, the user's cache folder, or --kv-dir for KV files and sessions."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import platformdirs
import pytest
from platformdirs.macos import MacOS
from platformdirs.unix import Unix

from kvswap.disk import folders, prepare_dir
from kvswap.errors import InputError, StorageError
from kvswap.sessions.catalog import session_path

EVERYTHING = (
    folders.calibration_folder,
    folders.tables_folder,
    folders.profiles_folder,
    folders.models_folder,
    folders.logs_folder,
    lambda: folders.kv_folder(None),
    lambda: folders.sessions_folder(None),
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Linux, a home folder of the test's own, and no variable that says otherwise."""
    monkeypatch.setattr(platformdirs, "PlatformDirs", Unix)
    for name in (folders.VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom the system does not know, as in a container that runs under a number."""

    def unknown(uid: int) -> object:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_everything_lies_in_the_users_cache_folder(tmp_path: Path) -> None:
    home = tmp_path / "home" / ".cache" / "kvswap"
    assert [folder().relative_to(home).as_posix() for folder in EVERYTHING] == [
        "calibration",
        "tables",
        "profiles",
        "models",
        "logs",
        "kv",
        "kv/sessions",
    ]
    assert session_path(None, "diary") == home / "kv" / "sessions" / "diary"


def test_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folders.kv_folder(None) == tmp_path / "kvswap" / "kv"
    for ignored in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert folders.kv_folder(None) == Path.home() / ".cache" / "kvswap" / "kv"


def test_cache_folder_of_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "PlatformDirs", MacOS)
    assert folders.kv_folder(None) == Path.home() / "Library" / "Caches" / "kvswap" / "kv"


def test_kvswap_home_moves_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setenv(folders.VARIABLE, str(tmp_path / "mine"))
    assert all(folder().is_relative_to(tmp_path / "mine") for folder in EVERYTHING)
    assert folders.kv_folder(None) == tmp_path / "mine" / "kv"
    monkeypatch.setenv(folders.VARIABLE, "~/mine")
    assert folders.home() == Path.home() / "mine"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(folders.VARIABLE, "below")
    assert folders.home() == tmp_path / "below"


def test_kv_dir_moves_kv_files_and_sessions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(folders.VARIABLE, str(tmp_path / "mine"))
    assert folders.kv_folder(str(tmp_path / "kv")) == tmp_path / "kv"
    assert folders.sessions_folder("~/kv") == Path.home() / "kv" / "sessions"
    monkeypatch.chdir(tmp_path)
    assert folders.kv_folder("kv") == tmp_path / "kv"


def test_user_without_a_home_is_told_what_to_set(homeless: None, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for folder in EVERYTHING:
        with pytest.raises(StorageError, match=r"no home folder.*KVSWAP_HOME.*--kv-dir"):
            folder()
    assert folders.kv_folder(tmp_path) == tmp_path
    monkeypatch.setenv(folders.VARIABLE, str(tmp_path))
    assert folders.home() == tmp_path


def test_home_of_nobody(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no-such-user.*KVSWAP_HOME"):
        folders.kv_folder("~no-such-user-of-ours/kv")


def test_home_that_is_a_file_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(folders.VARIABLE, str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"is a file.*--kv-dir.*KVSWAP_HOME"):
        prepare_dir(folders.kv_folder(None))


def test_read_only_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(StorageError, match=r"Read-only file system.*--kv-dir.*KVSWAP_HOME"):
        prepare_dir(folders.kv_folder(None))


def test_paths_of_users_are_expanded_in_one_place() -> None:
    """``~`` works wherever a user gives a path, and an unknown user is an error that says so, not a RuntimeError."""
    source = Path(folders.__file__).parents[1]
    calls = {path.relative_to(source).as_posix() for path in source.rglob("*.py") if "expanduser" in path.read_text()}
    assert calls == {"disk/folders.py", "config.py"}  # config.py may import nothing, and translates the error itself
    assert folders.user_path("~/a.json") == Path.home() / "a.json"
    with pytest.raises(InputError, match=r"no-such-user-of-ours.*give the path without ~"):
        folders.user_path("~no-such-user-of-ours/a.json")
