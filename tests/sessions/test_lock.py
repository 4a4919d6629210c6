"""A lock is worth something only on a folder that is still there; nothing is written after a failed fdatasync."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvswap.config import Config
from kvswap.disk.private_folder import PrivateFolder
from kvswap.errors import DiskWriteError, SessionError
from kvswap.models.loading import LoadedModel
from kvswap.sessions import lock
from kvswap.sessions.session import Session
from tests.helpers.families import tiny_model, tokens
from tests.helpers.folders import byte_tokenizer


def replaced(path: Path) -> None:
    os.rename(path, path.with_name("elsewhere"))
    path.mkdir(mode=0o700)


@pytest.mark.parametrize("locked_before", [True, False])
@pytest.mark.parametrize("change", [shutil.rmtree, lambda path: os.rename(path, path.with_name("elsewhere")), replaced])
def test_a_folder_that_is_gone_is_not_locked(change: Callable[[Path], None], locked_before: bool, tmp_path) -> None:
    with contextlib.closing(PrivateFolder.create(tmp_path / "s")) as folder:
        if locked_before:
            lock.release(lock.acquire(folder, "session s"))
        change(tmp_path / "s")
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(SessionError, match="session s was removed by another process"):
            lock.acquire(folder, "session s")
        assert len(os.listdir("/proc/self/fd")) == before


def test_lock_file_that_appears_in_between_is_taken(tmp_path, monkeypatch) -> None:
    with contextlib.closing(PrivateFolder.create(tmp_path / "s")) as folder:
        real = folder.make

        def make(name: str) -> int:
            os.close(real(name))
            return real(name)

        monkeypatch.setattr(folder, "make", make)
        lock.release(lock.acquire(folder, "session s"))


@pytest.mark.usefixtures("cache_home")
def test_nothing_is_written_to_data_files_after_a_failed_fdatasync(tmp_path, monkeypatch) -> None:
    """The first try may have dropped the bytes: a second one that succeeds would be believed."""
    model = LoadedModel(tiny_model("llama", vocab_size=300), byte_tokenizer(), "tiny-llama")
    config = Config(select_tokens=56, recent_tokens=16, kv_memory="4MiB", kv_dir=str(tmp_path / "kv"))
    with Session.create("s", model, config) as session:
        session.append(tokens(1, 130)[0].tolist())
        ids = session.token_ids
        session._forward(tokens(1, 60, seed=1)[0].tolist())
        cache = session.cache
        state = cache._state
        assert state is not None
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "planted")))
            with pytest.raises(DiskWriteError, match="planted"):
                cache.commit([*ids, *range(60)])
        for again in (lambda: cache.commit([*ids, *range(60)]), lambda: state.store._make_room(0, 100)):
            with pytest.raises(DiskWriteError, match="planted"):
                again()
        session.rollback()
        session.append([5, 6, 7])
        assert session.token_ids == [*ids, 5, 6, 7]
