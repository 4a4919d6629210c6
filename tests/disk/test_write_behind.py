"""The write queue: order, room, and errors that nobody can miss."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvswap.disk import Faults, MemoryBackend, Slab, WriteBehind
from kvswap.errors import DiskFullError, DiskWriteError
from tests.helpers.backends import NAMES, UNIT, content, make, submit


class GatedBackend(MemoryBackend):
    """Writes wait until the gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def write(self, file: int, offset_bytes: int, data: NDArray[np.uint8]) -> None:
        assert self.gate.wait(10)
        super().write(file, offset_bytes, data)


@pytest.fixture
def gated() -> Iterator[tuple[GatedBackend, WriteBehind, int]]:
    backend = GatedBackend()
    writes = WriteBehind(backend, 4 * UNIT)
    yield backend, writes, backend.open(64 * UNIT)
    backend.gate.set()
    writes.close()


def put(writes: WriteBehind, file: int, offset: int, data: NDArray[np.uint8]) -> int:
    buffer = writes.acquire(data.nbytes)
    buffer[:] = data
    return writes.submit(file, offset, buffer)


@pytest.mark.parametrize("name", NAMES)
def test_read_after_wait_for_sees_the_new_bytes(name: str, tmp_path: Path) -> None:
    backend = make(name, tmp_path)
    writes, slab = WriteBehind(backend, 64 * UNIT), Slab(UNIT)
    file = backend.open(8 * UNIT)
    for turn in range(64):
        data = content(UNIT, turn)
        offset = turn % 8 * UNIT
        number = put(writes, file, offset, data)
        writes.wait_for(number)
        assert writes.done(number)
        backend.wait(submit(backend, [(file, offset, UNIT, slab.address)]))
        assert np.array_equal(slab.array, data)
    writes.close()
    backend.close()


@given(st.lists(st.integers(1, 16), max_size=60))
@settings(max_examples=30, deadline=None)
def test_any_sizes_arrive_in_order(sizes: list[int]) -> None:
    """Buffers of all sizes through a ring of 32 sectors; later writes to the same place win."""
    backend = MemoryBackend()
    writes, slab = WriteBehind(backend, 32 * 512), Slab(16 * 512)
    file = backend.open(16 * 512)
    wanted = np.zeros(16 * 512, dtype=np.uint8)
    for turn, sectors in enumerate(sizes):
        data = content(sectors * 512, turn)
        wanted[: data.nbytes] = data
        assert put(writes, file, 0, data) == turn + 1
    writes.flush()
    assert writes.pending_bytes == 0
    backend.wait(submit(backend, [(file, 0, 16 * 512, slab.address)]))
    assert np.array_equal(slab.array[: 16 * 512], wanted)
    writes.close()


def test_acquire_blocks_until_there_is_room(gated: tuple[GatedBackend, WriteBehind, int]) -> None:
    backend, writes, file = gated
    for turn in range(4):
        put(writes, file, turn * UNIT, content(UNIT, turn))
    assert writes.pending_bytes == 4 * UNIT
    assert not writes.done(1)
    acquired = threading.Event()

    def fifth() -> None:
        put(writes, file, 4 * UNIT, content(UNIT))
        acquired.set()

    thread = threading.Thread(target=fifth)
    thread.start()
    assert not acquired.wait(0.1)
    backend.gate.set()
    assert acquired.wait(5)
    thread.join()
    writes.flush()
    assert writes.done(5)
    assert writes.pending_bytes == 0


def test_buffers_in_use_never_overlap() -> None:
    backend = MemoryBackend()
    writes = WriteBehind(backend, 8 * 512)  # so little that the ring is always full and wraps
    file = backend.open(1024 * UNIT)
    errors: list[str] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for turn in range(100):
            buffer = writes.acquire(int(rng.integers(1, 4)) * 512)
            buffer[:] = seed
            time.sleep(0)
            if not (buffer == seed).all():
                errors.append(f"{seed} at {turn}")
            writes.submit(file, (seed * 100 + turn) * UNIT, buffer)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writes.flush()
    writes.close()
    assert errors == []
    assert backend.counters.writes == 400


def test_a_buffer_is_submitted_once_or_discarded(gated: tuple[GatedBackend, WriteBehind, int]) -> None:
    _, writes, file = gated
    for _ in range(20):
        writes.discard(writes.acquire(2 * UNIT))
    buffer = writes.acquire(UNIT)
    with pytest.raises(ValueError, match="not multiples"):
        writes.submit(file, 3, buffer)
    writes.submit(file, 0, buffer[:512])
    for again in (buffer, np.zeros(0, dtype=np.uint8)):
        with pytest.raises(ValueError, match="not from acquire"):
            writes.discard(again)


def test_sizes_of_acquire(gated: tuple[GatedBackend, WriteBehind, int]) -> None:
    _, writes, _ = gated
    assert (writes.nbytes, writes.largest_bytes) == (4 * UNIT, 2 * UNIT)
    for nbytes in (0, 2 * UNIT + 1):
        with pytest.raises(ValueError, match="a write buffer has"):
            writes.acquire(nbytes)


def test_close_writes_what_is_queued() -> None:
    backend = MemoryBackend()
    writes = WriteBehind(backend, 8 * UNIT)
    file = backend.open(UNIT)
    for turn in range(5):
        put(writes, file, 0, content(UNIT, turn))
    writes.close()
    writes.close()
    assert backend.counters.writes == 5
    with pytest.raises(ValueError, match="closed"):
        writes.acquire(UNIT)


def test_enospc_reaches_every_call() -> None:
    faults = Faults(full_at_write=3)
    backend = MemoryBackend(faults=faults)
    writes = WriteBehind(backend, 4 * UNIT)
    file = backend.open(UNIT)
    held = writes.acquire(UNIT)
    with pytest.raises(DiskFullError, match="No space left") as caught:
        for turn in range(50):
            put(writes, file, 0, content(UNIT, turn))
    assert "free some space" in caught.value.hint
    writes.discard(held)
    for call in (
        lambda: writes.acquire(UNIT),
        lambda: writes.done(1),
        lambda: writes.wait_for(1),
        writes.flush,
        lambda: put(writes, file, 0, content(UNIT)),
    ):
        with pytest.raises(DiskFullError):
            call()
    assert backend.counters.writes == 2
    assert writes.pending_bytes == 0
    writes.close()


def test_error_wakes_a_blocked_acquire(gated: tuple[GatedBackend, WriteBehind, int]) -> None:
    backend, writes, file = gated
    backend.faults.full_at_write = 1
    for turn in range(4):
        put(writes, file, turn * UNIT, content(UNIT, turn))
    threading.Timer(0.05, backend.gate.set).start()
    with pytest.raises(DiskFullError):
        writes.acquire(2 * UNIT)


def test_a_writer_that_breaks_is_not_silent() -> None:
    writes = WriteBehind(MemoryBackend(), 4 * UNIT)
    put(writes, 5, 0, content(UNIT))  # no such file
    with pytest.raises(DiskWriteError, match="IndexError"):
        writes.flush()
    writes.close()
