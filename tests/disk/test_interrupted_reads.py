"""Ctrl-C and signals in the middle of reads: nothing stays in flight, nothing is lost, and the backend goes on."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvswap.disk import Slab
from kvswap.disk.uring_backend import UringBackend
from kvswap.errors import DiskReadError
from tests.helpers.backends import POISON, RINGS, UNIT, content, filled, make, strike, submit


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
