"""Reads that fail, come short or never come: tried again, then raised; stale bytes are never taken for data."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvswap.disk import Faults, MemoryBackend, Slab
from kvswap.disk.file_backend import FileBackend
from kvswap.disk.uring_backend import UringBackend
from kvswap.disk.uring_ring import FailedRead
from kvswap.errors import DiskReadError
from tests.helpers.backends import POISON, RINGS, UNIT, content, filled, make, strike, submit

REAL = (*RINGS, "threads", "buffered")


@pytest.mark.parametrize(
    "faults",
    [Faults(fail_reads=3), Faults(fail_reads=2, read_errno=errno.EAGAIN), Faults(lost_reads=3), Faults(short_reads=2)],
)
def test_memory_faults_are_retried(faults: Faults, slab: Slab) -> None:
    backend = MemoryBackend(faults=faults)
    file = filled(backend)
    backend.wait(submit(backend, [(file, 0, 2 * UNIT, slab.address)]))
    assert np.array_equal(slab.array[: 2 * UNIT], content(16 * UNIT)[: 2 * UNIT])
    assert backend.counters.retries >= 2


@pytest.mark.parametrize(
    ("faults", "reason"),
    [(Faults(fail_reads=4), "EIO"), (Faults(lost_reads=4), "ended too early"), (Faults(short_reads=9), "too early")],
)
def test_memory_faults_are_raised_in_the_end(faults: Faults, reason: str, slab: Slab) -> None:
    backend = MemoryBackend(faults=faults)
    file = filled(backend)
    with pytest.raises(DiskReadError, match=reason) as caught:
        backend.wait(submit(backend, [(file, 0, UNIT, slab.address)]))
    assert caught.value.retryable
    assert (slab.array[UNIT - 512 : UNIT] == POISON).all()
    backend.faults = Faults()
    backend.wait(submit(backend, [(file, 0, UNIT, slab.address)]))


def test_memory_bytes_arrive_in_wait_only(slab: Slab) -> None:
    backend = MemoryBackend(latency_s=0.05)
    file = filled(backend)
    ticket = submit(backend, [(file, 0, UNIT, slab.address)])
    assert (slab.array[:UNIT] == POISON).all()
    backend.wait(ticket)
    assert np.array_equal(slab.array[:UNIT], content(16 * UNIT)[:UNIT])
    assert backend.counters.wait_s > 0.03


def test_memory_refuses_misaligned_reads(slab: Slab) -> None:
    backend = MemoryBackend()
    with pytest.raises(ValueError, match="not multiples"):
        submit(backend, [(backend.open(UNIT), 100, UNIT, slab.address)])


class Preadv:
    """``os.preadv`` that strikes on its first calls: raises an errno, or delivers ``short`` bytes of what is asked.

    ``claim`` is how many it says they were.
    """

    def __init__(self, strikes: int, *, code: int = 0, short: int = 0, claim: int | None = None) -> None:
        self.strikes, self.code, self.short, self.claim = strikes, code, short, claim
        self.real = os.preadv

    def __call__(self, fd: int, buffers: list[ctypes.Array[ctypes.c_char]], offset: int) -> int:
        if self.strikes <= 0:
            return self.real(fd, buffers, offset)
        self.strikes -= 1
        if self.code:
            raise OSError(self.code, os.strerror(self.code))
        part = (ctypes.c_char * self.short).from_buffer(buffers[0])
        read = self.real(fd, [part], offset) if self.short else 0
        return read if self.claim is None else self.claim


@pytest.mark.parametrize("fault", [{"code": errno.EIO}, {"short": 1024}, {"short": 0}, {"short": 1024, "claim": 700}])
def test_threads_retry(fault: dict[str, int], tmp_path: Path, slab: Slab, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make("threads", tmp_path)
    file = filled(backend)
    monkeypatch.setattr(os, "preadv", Preadv(3, **fault))
    backend.wait(submit(backend, [(file, UNIT, 2 * UNIT, slab.address)]))
    assert np.array_equal(slab.array[: 2 * UNIT], content(16 * UNIT)[UNIT : 3 * UNIT])
    assert backend.counters.retries == 3
    backend.close()


def test_threads_raise_in_the_end(tmp_path: Path, slab: Slab, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make("threads", tmp_path)
    file = filled(backend)
    monkeypatch.setattr(os, "preadv", Preadv(1000, code=errno.EIO))
    with pytest.raises(DiskReadError, match=rf"{UNIT} bytes at offset {UNIT} of KV file {file}: EIO"):
        backend.wait(submit(backend, [(file, UNIT, UNIT, slab.address)] * 20))
    assert (slab.array == POISON).all()
    assert backend.counters.reads == 0
    monkeypatch.undo()
    backend.wait(submit(backend, [(file, UNIT, UNIT, slab.address)]))
    backend.close()


@pytest.mark.parametrize("name", RINGS)
@pytest.mark.parametrize("result", [-errno.EIO, -errno.EAGAIN, 0, 1024, 100])
def test_uring_retries(result: int, name: str, tmp_path: Path, slab: Slab, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make(name, tmp_path, depth=4)
    file = filled(backend)
    strike(monkeypatch, 3, result)
    rows = [(file, unit * UNIT, UNIT, slab.address + unit * UNIT) for unit in range(16)]
    tickets = [submit(backend, rows[:7]), submit(backend, rows[7:])]
    backend.wait(tickets[1])
    backend.wait(tickets[0])
    assert np.array_equal(slab.array[: 16 * UNIT], content(16 * UNIT))
    assert backend.counters.retries == 3
    assert backend.counters.read_bytes == 16 * UNIT
    backend.close()


@pytest.mark.parametrize("name", RINGS)
def test_uring_raises_in_the_end_for_that_ticket_only(
    name: str, tmp_path: Path, slab: Slab, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make(name, tmp_path, depth=4)
    file = filled(backend)
    strike(monkeypatch, 4, -errno.EIO)
    bad = submit(backend, [(file, UNIT, UNIT, slab.address)])
    with pytest.raises(DiskReadError, match=rf"{UNIT} bytes at offset {UNIT} of KV file {file}: EIO"):
        backend.wait(bad)
    backend.wait(submit(backend, [(file, 0, UNIT, slab.address)] * 20))
    assert backend.counters.reads == 20
    backend.close()


@pytest.mark.parametrize("name", RINGS)
def test_uring_kernel_error_leaves_the_other_ticket_whole(name: str, tmp_path: Path, slab: Slab) -> None:
    """A target that may not be written: EFAULT from the kernel itself."""
    backend = make(name, tmp_path)
    file = filled(backend)
    with mmap.mmap(-1, UNIT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ) as closed:
        address = int(np.frombuffer(closed, dtype=np.uint8).ctypes.data)
        good = submit(backend, [(file, unit * UNIT, UNIT, slab.address + unit * UNIT) for unit in range(16)])
        bad = submit(backend, [(file, 0, UNIT, address)] * 20)
        with pytest.raises(DiskReadError, match="EFAULT"):
            backend.wait(bad)
        backend.wait(good)
        assert np.array_equal(slab.array[: 16 * UNIT], content(16 * UNIT))
        backend.close()


@pytest.mark.parametrize("name", REAL)
def test_failed_ticket_leaves_nothing_in_flight(name: str, tmp_path: Path, slab: Slab) -> None:
    """After the error the memory may be reused: no late read lands in it."""
    backend = make(name, tmp_path, depth=4)
    file = filled(backend)
    rows = [(file, 16 * UNIT, UNIT, slab.address)]
    rows += [(file, unit % 16 * UNIT, UNIT, slab.address + unit * UNIT) for unit in range(1, 60)]
    with pytest.raises(DiskReadError, match="ended too early"):
        backend.wait(submit(backend, rows))
    slab.array[:] = POISON
    time.sleep(0.02)
    assert (slab.array == POISON).all()
    backend.close()


def test_end_of_file_inside_a_sector(tmp_path: Path, slab: Slab) -> None:
    """A file cut at an odd length: the rest is asked for from an aligned place, and its absence is an error."""
    for name in REAL:
        backend = make(name, tmp_path)
        assert isinstance(backend, FileBackend)
        file = filled(backend)
        os.ftruncate(int(backend._fds[file]), 1000)
        with pytest.raises(DiskReadError, match="ended too early"):
            backend.wait(submit(backend, [(file, 0, UNIT, slab.address)]))
        backend.close()


@pytest.mark.parametrize("name", RINGS)
@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EBADF])
def test_uring_enter_errors(code: int, name: str, tmp_path: Path, slab: Slab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy kernel is asked again; a ring that does not work is an error, and nothing stays in flight."""
    backend = make(name, tmp_path)
    assert isinstance(backend, UringBackend)
    file = filled(backend)
    ring, left = backend._ring, [2 if code == errno.EAGAIN else 1]
    submit_now, collect_now = ring.submit, ring.collect

    def without_kernel(call: Callable[..., Any], *arguments: object) -> Any:
        left[0] -= 1
        fd, ring.memory.fd = ring.memory.fd, -1
        try:
            return call(*arguments)
        finally:
            ring.memory.fd = fd

    def submit_refused(*arguments: Any) -> int:
        if not left[0]:
            return submit_now(*arguments)
        assert without_kernel(submit_now, *arguments) == errno.EBADF
        return code

    def collect_refused(wait_for: int) -> tuple[int, list[FailedRead]]:
        if not (left[0] and wait_for):
            return collect_now(wait_for)
        assert without_kernel(collect_now, wait_for) == (errno.EBADF, [])
        return code, []

    monkeypatch.setattr(ring, "submit", submit_refused)
    monkeypatch.setattr(ring, "collect", collect_refused)
    if code == errno.EAGAIN:
        backend.wait(submit(backend, [(file, 0, UNIT, slab.address)]))
        assert np.array_equal(slab.array[:UNIT], content(16 * UNIT)[:UNIT])
    else:
        with pytest.raises(DiskReadError, match="io_uring_enter"):
            submit(backend, [(file, 0, UNIT, slab.address)])
        backend.wait(submit(backend, [(file, 0, UNIT, slab.address)]))
    assert left == [0]
    monkeypatch.undo()
    backend.close()


@pytest.mark.parametrize("name", REAL)
def test_two_reading_threads_take_turns(name: str, tmp_path: Path) -> None:
    backend = make(name, tmp_path, depth=4)
    file = filled(backend)
    wrong: list[int] = []

    def work() -> None:
        own = Slab(16 * UNIT)
        for turn in range(100):
            own.array[:] = POISON
            rows = [(file, unit * UNIT, UNIT, own.address + unit * UNIT) for unit in range(16)]
            backend.wait(submit(backend, rows))
            if not np.array_equal(own.array, content(16 * UNIT)):
                wrong.append(turn)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    backend.close()
