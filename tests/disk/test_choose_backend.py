"""Every fallback from the fastest backend is a notice and a log entry, and asking for the impossible is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvswap.disk import DirectProbe, create_backend
from kvswap.disk.uring_backend import probe_uring
from kvswap.disk.uring_ring import Ring
from kvswap.errors import StorageError
from tests.helpers.system import has_direct_io, has_io_uring


def refuse_ring(self: Ring, depth: int) -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.fixture
def no_uring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ring, "__init__", refuse_ring)


@pytest.fixture
def no_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = DirectProbe(ok=False, alignment_bytes=0, memory_alignment_bytes=0, filesystem="zfs", reason="EINVAL (zfs)")
    monkeypatch.setattr("kvswap.disk.choose_backend.probe_direct", lambda folder: probe)


def test_auto_takes_the_best(tmp_path: Path) -> None:
    notices: list[str] = []
    backend = create_backend("auto", tmp_path / "new", 8, on_notice=notices.append)
    if has_direct_io(tmp_path) and has_io_uring():
        assert (backend.name, backend.direct, notices) == ("uring", True, [])
    else:
        assert notices
    backend.close()


def test_no_uring_falls_back_to_threads(tmp_path: Path, no_uring: None) -> None:
    if not has_direct_io(tmp_path):
        pytest.skip("no direct I/O here")
    assert probe_uring() == (False, "EPERM, Operation not permitted")
    notices: list[str] = []
    backend = create_backend("auto", tmp_path, 8, on_notice=notices.append)
    assert (backend.name, backend.direct) == ("threads", True)
    assert "EPERM" in notices[0]
    assert len(notices) == 1
    backend.close()
    with pytest.raises(StorageError, match=r"backend uring: .*EPERM"):
        create_backend("uring", tmp_path, 8, on_notice=notices.append)


def test_no_direct_falls_back_to_buffered(tmp_path: Path, no_direct: None, caplog: pytest.LogCaptureFixture) -> None:
    notices: list[str] = []
    with caplog.at_level("DEBUG", logger="kvswap"):
        backend = create_backend("auto", tmp_path, 8, on_notice=notices.append)
    assert [record.name for record in caplog.records] == ["kvswap", "kvswap"]
    assert "EINVAL (zfs)" in caplog.text and "backend buffered in" in caplog.text
    assert (backend.name, backend.direct) == ("buffered", False)
    assert "EINVAL (zfs)" in notices[0]
    assert "page cache" in notices[0]
    backend.close()
    for name in ("uring", "threads"):
        with pytest.raises(StorageError, match=f"backend {name}: direct I/O does not work"):
            create_backend(name, tmp_path, 8, on_notice=notices.append)


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="use one of auto"):
        create_backend("mmap", tmp_path, 8, on_notice=print)


@pytest.mark.parametrize("name", ["buffered", "memory"])
def test_explicit_names(name: str, tmp_path: Path) -> None:
    backend = create_backend(name, tmp_path, 8, on_notice=pytest.fail)
    assert backend.name == name
    backend.close()
