"""Reads that fail, come short or never come: tried again, then raised; stale bytes are never taken for data."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvswap.disk import Faults, MemoryBackend, ReadBackend, Slab
from kvswap.disk.file_backend import FileBackend
from kvswap.disk.uring_backend import UringBackend
from kvswap.disk.uring_ring import CompiledRing, FailedRead, Ring
from kvswap.errors import DiskReadError
from tests.helpers.backends import RINGS, UNIT, content, make, submit, write_all

POISON = 0xDD
Collect = Callable[[Ring, int], tuple[int, list[FailedRead]]]
REAL = (*RINGS, "threads", "buffered")


@pytest.fixture
def slab() -> Iterator[Slab]:
    made = Slab(64 * UNIT)
    made.array[:] = POISON
    yield made
    made.close()


def filled(backend: ReadBackend, units: int = 16) -> int:
    file = backend.open(units * UNIT)
    write_all(backend, file, content(units * UNIT))
    return file


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


def strike(monkeypatch: pytest.MonkeyPatch, strikes: int, result: int) -> None:
    """Let the next completions of every ring carry ``result`` instead of their own, in the shared memory."""
    left = [strikes]
    for kind in (Ring, CompiledRing):

        def collect(self: Ring, wait_for: int, real: Collect = kind.collect) -> tuple[int, list[FailedRead]]:
            code = self.enter(wait_for) if wait_for else 0
            if code:
                return code, []
            for place in range(int(self._cq_head[0]), int(self._cq_tail[0])):  # far from where counters come round
                if left[0]:
                    self._results[place % len(self._results)] = result
                    left[0] -= 1
            return real(self, 0)

        monkeypatch.setattr(kind, "collect", collect)


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


@pytest.mark.parametrize("name", [*RINGS, "threads"])
def test_interrupted_wait_drains(name: str, tmp_path: Path, slab: Slab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a wait: nothing is in flight when it arrives, and the backend goes on."""
    backend = make(name, tmp_path, depth=4)
    file = filled(backend)
    rows = [(file, unit * UNIT, UNIT, slab.address + unit * UNIT) for unit in range(16)]
    elsewhere = [(file, offset, length, address + 16 * UNIT) for file, offset, length, address in rows]
    if name == "threads":
        monkeypatch.setattr(os, "preadv", slow_preadv)
    tickets = [submit(backend, rows), submit(backend, elsewhere)]
    if isinstance(backend, UringBackend):
        monkeypatch.setattr(backend, "_collect", InterruptOnce(backend._collect))
    else:
        time.sleep(0.01)  # the workers are inside their first reads now
        monkeypatch.setattr(threading.Condition, "wait", InterruptOnce(threading.Condition.wait))
    with pytest.raises(KeyboardInterrupt):
        backend.wait(tickets[0])
    slab.array[: 16 * UNIT] = POISON
    if isinstance(backend, UringBackend):
        with pytest.raises(DiskReadError, match="given up"):
            backend.wait(tickets[1])
    else:
        backend.wait(tickets[1])
    time.sleep(0.02)
    assert (slab.array[: 16 * UNIT] == POISON).all()
    backend.wait(submit(backend, rows))
    assert np.array_equal(slab.array[: 16 * UNIT], content(16 * UNIT))
    backend.close()


def slow_preadv(fd: int, buffers: list[ctypes.Array[ctypes.c_char]], offset: int, real: Any = os.preadv) -> int:
    """So slow that a read is surely in flight when its wait is interrupted."""
    time.sleep(0.03)
    return int(real(fd, buffers, offset))


class InterruptOnce:
    """Stands for a method: the first call is interrupted, later ones are real."""

    def __init__(self, real: Callable[..., object]) -> None:
        self.real, self.fresh = real, True

    def __call__(self, *args: object) -> object:
        if self.fresh:
            self.fresh = False
            raise KeyboardInterrupt
        return self.real(*args)

    def __get__(self, instance: object, owner: type) -> Callable[..., object]:
        """Bound like a function where it stands for one of a class."""
        return lambda *args: self(instance, *args)


@pytest.mark.parametrize("name", RINGS)
def test_second_interrupt_while_draining(
    name: str, tmp_path: Path, slab: Slab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C twice: the next call finishes what the first drain could not, and no wait hangs."""
    backend = make(name, tmp_path, depth=4)
    assert isinstance(backend, UringBackend)
    file = filled(backend)
    rows = [(file, unit * UNIT, UNIT, slab.address + unit * UNIT) for unit in range(16)]
    tickets = [submit(backend, rows), submit(backend, rows)]
    monkeypatch.setattr(backend, "_collect", InterruptOnce(backend._collect))
    monkeypatch.setattr(backend._ring, "drain", InterruptOnce(backend._ring.drain))
    with pytest.raises(KeyboardInterrupt):
        backend.wait(tickets[0])
    with pytest.raises(DiskReadError, match="given up"):
        backend.wait(tickets[1])
    backend.wait(submit(backend, rows))
    assert np.array_equal(slab.array[: 16 * UNIT], content(16 * UNIT))
    monkeypatch.undo()
    backend.close()


@pytest.mark.parametrize("name", RINGS)
def test_failed_read_is_not_forgotten_in_an_interrupt(
    name: str, tmp_path: Path, slab: Slab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C when the ring has reported a failed read and nobody has seen to it: its ticket fails."""
    backend = make(name, tmp_path, depth=4)
    assert isinstance(backend, UringBackend)
    file = filled(backend)
    bad = submit(backend, [(file, 0, UNIT, slab.address)])
    good = submit(backend, [(file, UNIT, UNIT, slab.address + UNIT)])
    time.sleep(0.02)
    strike(monkeypatch, 1, -errno.EIO)
    monkeypatch.setattr(backend, "_send_again", InterruptOnce(backend._send_again))
    with pytest.raises(KeyboardInterrupt):
        backend.wait(good)
    with pytest.raises(DiskReadError, match="given up"):
        backend.wait(bad)
    monkeypatch.undo()
    backend.wait(submit(backend, [(file, 0, UNIT, slab.address)]))
    backend.close()


@pytest.mark.parametrize("name", [*RINGS, "threads"])
def test_interrupted_submit_drains(name: str, tmp_path: Path, slab: Slab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C inside submit: the caller has no ticket, so nothing may be in flight."""
    backend = make(name, tmp_path, depth=4)
    file = filled(backend)
    rows = [(file, unit * UNIT, UNIT, slab.address + unit * UNIT) for unit in range(16)]
    with monkeypatch.context() as patch:
        if isinstance(backend, UringBackend):
            patch.setattr(backend, "_check", InterruptOnce(backend._check))
        else:
            patch.setattr(backend, "_queue", InterruptingQueue())
        with pytest.raises(KeyboardInterrupt):
            submit(backend, rows)
    slab.array[:] = POISON
    time.sleep(0.02)
    assert (slab.array == POISON).all()
    backend.wait(submit(backend, rows))
    backend.close()


class InterruptingQueue:
    def put(self, item: object) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", RINGS)
def test_uring_survives_signals(name: str, tmp_path: Path, slab: Slab) -> None:
    """A timer signal every millisecond: system calls are interrupted, no read is lost."""
    backend = make(name, tmp_path, depth=4)
    file = filled(backend)
    previous = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for _ in range(200):
            rows = [(file, unit * UNIT, UNIT, slab.address + unit * UNIT) for unit in range(16)]
            slab.array[: 16 * UNIT] = POISON
            backend.wait(submit(backend, rows))
            assert np.array_equal(slab.array[: 16 * UNIT], content(16 * UNIT))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
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
