"""Every call site that writes, synchronises, renames or reads for a session fails once, in every way a disk can fail.

After each failure the session is opened with a healthy disk. It is in a committed state, and continues correctly.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvswap.errors import KVSwapError
from kvswap.sessions.check import check
from kvswap.sessions.encryption import KEY_VARIABLE
from kvswap.sessions.session import Session
from tests.sessions import crash_worker
from tests.sessions.crash_worker import HEIR, KEY, MODEL, NAME, OPERATIONS, apply, config

SOURCE = str(Path(crash_worker.__file__).parents[2] / "src" / "kvswap")
# The calls that make a session durable or read it, and how each may fail: an errno, or fewer bytes than asked for.
FAILURES: dict[str, tuple[int | str, ...]] = {
    "pwrite": (errno.ENOSPC, errno.EIO, "short"),
    "pread": (errno.EIO, "short"),
    "fdatasync": (errno.EIO, errno.ENOSPC),
    "fsync": (errno.EIO,),
    "rename": (errno.EIO, errno.ENOSPC),
    "link": (errno.EIO, errno.EPERM),
    "open": (errno.EIO, errno.EMFILE),
    "unlink": (errno.EIO,),
    "mkdir": (errno.ENOSPC,),
    "posix_fallocate": (errno.ENOSPC, errno.EIO),
    "ftruncate": (errno.EIO,),
}


@pytest.fixture(autouse=True)
def torch_threads() -> None:
    """One thread, as in the children, which are forked."""
    torch.set_num_threads(1)


class Disk:
    """Stands in for functions of ``os``: notes who calls, and fails one call."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sites: set[tuple[str, str]] = set()
        self.target: tuple[str, str] | None = None
        self.how: int | str = 0
        self.failed = False
        for name in FAILURES:
            if hasattr(os, name):
                patch.setattr(os, name, self._stand_in(name, getattr(os, name)))

    def _stand_in(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            file = frame.f_code.co_filename
            if not file.startswith(SOURCE) or "/models/" in file:
                return real(*args, **kwargs)
            site = (name, f"{Path(file).name}:{frame.f_lineno}")
            self.sites.add(site)
            if site != self.target or self.failed:
                return real(*args, **kwargs)
            self.failed = True
            if self.how != "short":
                raise OSError(int(self.how), os.strerror(int(self.how)))
            if name == "pread":
                return real(args[0], args[1] // 2, *args[2:])
            return real(args[0], args[1][: len(args[1]) // 2 // 512 * 512 or 1], *args[2:])

        return call


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> list[list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        return crash_worker.reference(tmp_path_factory.mktemp("reference"))[0]


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def play(folder: Path, *, encrypt: bool = False) -> None:
    """The schedule, with one reopening in it."""
    settings = config(folder).replace(backend="threads")
    with Session.create(NAME, MODEL, settings, encrypt=encrypt) as session:
        for number in range(4):
            apply(session, number)
    with Session.open(NAME, MODEL, settings) as session:
        for number in range(4, 9):
            apply(session, number)
        whole = session.token_ids
    with Session.create(HEIR, MODEL, settings, encrypt=encrypt) as session:
        assert session.share_prefix([*whole, 1]) in (NAME, None)


def sites(tmp_path: Path, *, encrypt: bool = False) -> list[tuple[str, str]]:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        play(tmp_path / "survey", encrypt=encrypt)
    return sorted(disk.sites)


def fail_once(
    site: tuple[str, str], how: int | str, folder: Path, states: list[list[int]], *, encrypt: bool = False
) -> bool:
    """Fail one call; whether that ended the schedule. Whatever it did, the session must be sound afterwards."""
    ended = False
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        disk.target, disk.how = site, how
        try:
            play(folder, encrypt=encrypt)
        except (KVSwapError, OSError) as error:
            ended = True
            assert isinstance(error, KVSwapError), f"{site} {how}: {error!r}"
        assert disk.failed, f"{site} was not reached again"
    root = folder / "kv" / "sessions"
    if (root / HEIR).exists():  # whole or empty
        with Session.open(HEIR, MODEL, config(folder)) as session:
            ids = session.token_ids
            assert any(ids == state[: len(ids)] for state in states), f"{site} {how}"
            assert check(session.store).problems == [], f"{site} {how}"
    path = root / NAME
    if not path.exists():
        return ended
    with Session.open(NAME, MODEL, config(folder)) as session:
        assert session.token_ids in states, f"{site} {how}"
        assert check(session.store).problems == [], f"{site} {how}"
        if ended:
            reached = max(n for n, ids in enumerate(states) if ids == session.token_ids)
            for number in range(reached, len(OPERATIONS)):
                apply(session, number)
                assert session.token_ids == states[number + 1], f"{site} {how}"
    return ended


def test_every_call_site_fails_once(tmp_path, states) -> None:
    found = sites(tmp_path)
    assert len(found) >= 20
    named = {(name, site.split(":")[0]) for name, site in found}
    wanted = {"pwrite", "pread", "fdatasync"}
    assert {(name, "private_folder.py") for name in wanted | {"fsync", "rename", "link", "open"}} <= named
    assert {("pwrite", "file_backend.py"), ("fdatasync", "file_backend.py")} <= named
    ended = 0
    for number, site in enumerate(found):
        ways = FAILURES[site[0]]
        ended += fail_once(site, ways[number % len(ways)], tmp_path / f"one{number}", states)
    assert ended > len(found) // 3


@pytest.mark.slow
@pytest.mark.parametrize("encrypt", [False, True])
def test_every_call_site_fails_in_every_way(tmp_path, states, encrypt) -> None:
    for number, site in enumerate(sites(tmp_path, encrypt=encrypt)):
        for how in FAILURES[site[0]]:
            fail_once(site, how, tmp_path / f"all{number}-{how}", states, encrypt=encrypt)
