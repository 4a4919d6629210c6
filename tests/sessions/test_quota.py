"""Limits count what is there: shared files once, what is written before it is committed, the quarantine."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvswap.config import Config
from kvswap.errors import DiskWriteError, StorageError
from kvswap.models.loading import LoadedModel
from kvswap.sessions import quota as quotas
from kvswap.sessions.catalog import freed_by_removal, remove, session_path, used_bytes
from kvswap.sessions.check import move_away, quarantine_path, quarantined, remove_quarantined
from kvswap.sessions.export_import import export_session, import_session
from kvswap.sessions.quota import Limits, Quota, read_written_bytes
from kvswap.sessions.session import Session
from tests.helpers.families import tiny_model, tokens
from tests.helpers.folders import byte_tokenizer

pytestmark = pytest.mark.usefixtures("cache_home")


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return LoadedModel(tiny_model("llama", vocab_size=300), byte_tokenizer(), "tiny-llama")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(select_tokens=56, recent_tokens=16, kv_memory="4MiB", kv_dir=str(tmp_path / "kv"))


def fill(name: str, model: LoadedModel, config: Config, *, fork: str | None = None) -> Path:
    with Session.create(name, model, config) as session:
        session.append(tokens(1, 500, seed=len(name))[0].tolist())
        if fork is not None:
            session.fork(fork)
    return session_path(config.kv_dir, name)


def test_forks_of_one_context_make_room_together(model, config) -> None:
    path = fill("one", model, config, fork="two")
    root = path.parent
    gains_bytes = freed_by_removal([path, path.with_name("two")])
    assert gains_bytes[1] > 10 * gains_bytes[0]
    notices: list[str] = []
    limits = Limits(quota_bytes=used_bytes(root) + 4096)
    Quota(root / "new", limits, notices.append).reserve(gains_bytes[1])
    assert len(notices) == 2 and not path.exists() and not path.with_name("two").exists()


def test_small_sessions_go_before_a_large_one_that_is_older(model, config, monkeypatch) -> None:
    large = fill("large", model, config)
    with Session.create("small", model, config) as session:
        session.append(tokens(1, 40)[0].tolist())
    small, root = large.with_name("small"), large.parent
    limits = Limits(quota_bytes=used_bytes(root) + 4096)
    sizes = [freed_by_removal([path])[0] for path in (small, large)]
    monkeypatch.setattr(quotas, "SMALL_PART", limits.quota_bytes // (sizes[0] + 1))
    assert sizes[0] * quotas.SMALL_PART < limits.quota_bytes < sizes[1] * quotas.SMALL_PART
    Quota(root / "new", limits, print).reserve(8192)
    assert large.exists() and not small.exists()
    monkeypatch.setattr(quotas, "SMALL_PART", 10**9)  # none is small: the oldest goes
    with Session.create("small", model, config) as session:
        session.append(tokens(1, 40)[0].tolist())
    Quota(root / "new", Limits(quota_bytes=used_bytes(root) + 4096), print).reserve(8192)
    assert small.exists() and not large.exists()


def test_what_an_open_session_shares_is_not_counted_as_room(model, config) -> None:
    path = fill("one", model, config, fork="two")
    with Session.open("two", model, config), pytest.raises(StorageError, match="disk quota"):
        Quota(path.with_name("new"), Limits(quota_bytes=used_bytes(path.parent)), print).reserve(200_000)
    assert path.exists()


def test_freed_bytes_are_what_removal_frees(model, config) -> None:
    paths = [fill(name, model, config, fork=f"{name}-fork") for name in ("a", "bb")]
    paths = sorted([*paths, *(path.with_name(f"{path.name}-fork") for path in paths)])
    for path, freed_bytes in zip(paths, freed_by_removal(paths), strict=True):
        before_bytes = used_bytes(path.parent)
        remove(path)
        assert before_bytes - used_bytes(path.parent) == freed_bytes, path


def test_write_limit_holds_between_commits(model, config) -> None:
    """No prompt and no answer, however long, writes more than the limit and the growth of files under way."""
    limit_bytes = 1 << 20
    with Session.create("s", model, config, limits=Limits(write_bytes=limit_bytes)) as session:
        session.append(tokens(1, 400)[0].tolist())
        with pytest.raises(StorageError, match="write limit"):
            for number in range(60):
                session.append(tokens(1, 120, seed=number)[0].tolist())
        assert read_written_bytes(session.store.folder.path.parent).day_bytes <= limit_bytes
        assert len(session.token_ids) == session.tokens + 1
    quota = Quota(session_path(config.kv_dir, "s"), Limits(write_bytes=2 * limit_bytes), print)
    quota.record(2 * limit_bytes - 1000 - read_written_bytes(quota.root).day_bytes)
    quota.reserve(600, planned=True)
    quota.reserve(600)
    with pytest.raises(StorageError, match="write limit"):
        quota.reserve(600)


def test_folders_are_not_walked_for_every_growth(model, config, monkeypatch) -> None:
    path = fill("one", model, config)
    walks = [0]

    def count(root: Path) -> int:
        walks[0] += 1
        return used_bytes(root)

    monkeypatch.setattr(quotas, "used_bytes", count)
    quota = Quota(path, Limits(quota_bytes=1 << 30), print)
    for _ in range(1000):
        quota.reserve(128 << 10)
    assert walks[0] <= 10


def test_quarantine_is_removed_on_request(model, config) -> None:
    path = fill("one", model, config)
    move_away(path, quarantine_path(path))
    taken_bytes = used_bytes(path.parent)
    assert len(quarantined(path.parent)) == 1 and taken_bytes > 100_000
    assert [words.split()[0] for words in remove_quarantined(path.parent)] == ["quarantined"]
    assert quarantined(path.parent) == [] and used_bytes(path.parent) < taken_bytes / 2


def test_bytes_of_failed_commits_forks_and_imports_are_counted(model, config, tmp_path, monkeypatch) -> None:
    """Each byte that goes to a file of a session is counted, whatever becomes of the change; and each once."""
    taken = [0]

    def count(real: Callable[..., int]) -> Callable[..., int]:
        def call(fd: int, data: Any, *rest: Any) -> int:
            wrote = real(fd, data, *rest)
            place = os.readlink(f"/proc/self/fd/{fd}")
            trial = place.endswith("(deleted)")  # whether the folder can do direct I/O
            taken[0] += wrote if not trial and Path(place).name not in (".usage", "lock") else 0
            return wrote

        return call

    broken = [False]

    def fdatasync(fd: int) -> None:
        if broken[0]:
            raise OSError(errno.EIO, "planted")

    monkeypatch.setattr(os, "pwrite", count(os.pwrite))
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with Session.create("s", model, config.replace(backend="threads")) as session:
        root, before = session.store.folder.path.parent, taken[0]
        session.append(tokens(1, 300)[0].tolist())
        assert read_written_bytes(root).total_bytes == taken[0] - before > 50_000
        good = taken[0]
        broken[0] = True
        with pytest.raises(DiskWriteError, match="planted"):
            session.append(tokens(1, 300, seed=1)[0].tolist())
        broken[0] = False
        assert taken[0] - good > 50_000
        assert read_written_bytes(root).total_bytes == taken[0] - before
        session.append([1, 2, 3])
        session.undo()
        session.fork("t")
        export_session(session.store, tmp_path / "s.kvswap")
        import_session(tmp_path / "s.kvswap", root / "u")
    assert read_written_bytes(root).total_bytes == taken[0] - before
