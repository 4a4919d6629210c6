"""Whoever reads a session while another process commits to it sees one of its states, and never damage.

The other process is a real one. It commits, truncates, takes back and forgets as fast as it can, so that files which a
reader has just learned about are removed, cut and overwritten before it opens them.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvswap.sessions import catalog
from kvswap.sessions.check import check
from kvswap.sessions.commits import SessionStore
from kvswap.sessions.encryption import KEY_VARIABLE
from kvswap.sessions.quota import Limits, Quota
from kvswap.sessions.sharing import find_prefix
from tests.sessions.test_fuzz import commit_groups, make

SECONDS = 1.5
KEY = "5c" * 32


def change(path: Path, rounds: Iterator[int]) -> None:
    """What the other process does."""
    rng = np.random.default_rng(1)
    with SessionStore.open(path, write=True) as store:
        for number in rounds:
            current = store.base
            groups = current.flushed[0] if current else 0
            if number % 7 == 6 and groups:
                store.undo()
            elif number % 11 == 10 or groups > 40:
                store.truncate(0)
            else:
                commit_groups(store, rng, groups, 1 + number % 3)


def main(path: Path) -> None:
    """Make changes until somebody kills this process."""
    change(path, itertools.count())


@contextlib.contextmanager
def busy(path: Path) -> Iterator[None]:
    """Another process works on the session, from its first commit on until the block ends."""
    before = SessionStore.open(path, write=False).manifest.commits
    words = [sys.executable, "-m", __name__, str(path)]
    worker = subprocess.Popen(words, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            with SessionStore.open(path, write=False) as store:
                if store.manifest.commits > before:
                    break
            assert worker.poll() is None, worker.stderr and worker.stderr.read()
            time.sleep(0.05)
        yield
        assert worker.poll() is None, worker.stderr and worker.stderr.read()
    finally:
        worker.kill()
        worker.communicate()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)


def read(path: Path) -> None:
    with SessionStore.open(path, write=False) as store:
        store.load()
        store.load(tail_only=True)
        if store.manifest.basis is not None:
            store.basis()


def read_again(path: Path) -> Callable[[], None]:
    """With a store that was opened long ago."""
    store = SessionStore.open(path, write=False)
    return lambda: (store.load(), None)[1]


def check_all(path: Path) -> None:
    with SessionStore.open(path, write=False) as store:
        report = check(store)
    assert report.problems == []


def look(path: Path) -> None:
    for entry in catalog.entries(path.parent):
        assert entry.manifest is not None, entry.problem
        assert entry.in_use == (entry.path == path)
    assert catalog.used_bytes(path.parent) > 0


def make_room(path: Path) -> None:
    catalog.prune(path.parent)
    catalog.freed_by_removal([path])
    Quota(path.with_name("new"), Limits(quota_bytes=1 << 40), print).reserve(1)


def find(path: Path) -> None:
    find_prefix([path], list(range(1000)), lambda manifest: True)


@pytest.mark.parametrize("encrypt", [False, True])
@pytest.mark.parametrize("reader", [read, read_again, check_all, look, make_room, find])
def test_readers_of_a_busy_session_see_no_damage(
    reader: Callable[[Path], Any], encrypt: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sessions").mkdir()
    path = make(tmp_path / "sessions" / "busy", encrypt=encrypt)
    once = reader(path) if reader is read_again else lambda: reader(path)
    with busy(path):
        until_s, rounds = time.monotonic() + SECONDS, 0
        while time.monotonic() < until_s:
            once()
            rounds += 1
    assert rounds > 5


if __name__ == "__main__":
    main(Path(sys.argv[1]))
