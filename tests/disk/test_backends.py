"""Law: all backends return the same bytes, in any order, at any count."""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvswap.config import Config
from kvswap.disk import ReadBackend, Slab
from kvswap.disk.file_backend import FileBackend
from kvswap.disk.uring_backend import UringBackend
from kvswap.errors import DiskReadError
from tests.helpers.backends import NAMES, RINGS, UNIT, content, make, submit, write_all

FILE_BYTES = 64 * UNIT


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ReadBackend]:
    made = make(request.param, tmp_path)
    yield made
    made.close()


@pytest.fixture
def slab() -> Iterator[Slab]:
    made = Slab(4 * FILE_BYTES)
    yield made
    made.close()


@given(
    extents=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 120), st.integers(1, 8)), max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_extents_are_byte_equal(
    backend: ReadBackend, extents: list[tuple[int, int, int]], cuts: list[int], order: random.Random
) -> None:
    """Extents of 512-byte sectors of two files, split over several tickets waited for in any order."""
    data = [content(FILE_BYTES, seed) for seed in (1, 2)]
    files = [backend.open(FILE_BYTES) for _ in data]
    for file, bytes_of_file in zip(files, data, strict=True):
        write_all(backend, file, bytes_of_file)
    slab = Slab(max(1, len(extents)) * UNIT)
    slab.array[:] = 0xEE
    rows = [
        (files[file], sector * 512, sectors * 512, slab.address + index * UNIT)
        for index, (file, sector, sectors) in enumerate(extents)
    ]
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    tickets = [submit(backend, rows[low:high]) for low, high in itertools.pairwise(edges)]
    order.shuffle(tickets)
    for ticket in tickets:
        backend.wait(ticket)
    for index, (file, sector, sectors) in enumerate(extents):
        wanted = data[file][sector * 512 : (sector + sectors) * 512]
        got = slab.array[index * UNIT : (index + 1) * UNIT]
        assert np.array_equal(got[: wanted.nbytes], wanted)
        assert (got[wanted.nbytes :] == 0xEE).all()
    slab.close()


@pytest.mark.parametrize("name", RINGS)
def test_by_default_no_read_of_a_batch_waits_for_another(name: str, tmp_path: Path, slab: Slab) -> None:
    """Eight sequences ask for some 150 reads a layer, and two layers are on their way: all are with the kernel."""
    backend = make(name, tmp_path, depth=Config().read_depth)
    assert isinstance(backend, UringBackend)
    file = backend.open(FILE_BYTES)
    write_all(backend, file, content(FILE_BYTES))
    rows = [(file, unit % 64 * UNIT, 512, slab.address + unit * 512) for unit in range(200)]
    tickets = [submit(backend, rows), submit(backend, rows)]
    assert not backend._waiting
    for ticket in tickets:
        backend.wait(ticket)
    backend.close()


def test_more_reads_than_depth_over_many_tickets(backend: ReadBackend, slab: Slab) -> None:
    data = content(FILE_BYTES)
    file = backend.open(FILE_BYTES)
    write_all(backend, file, data)
    rows = [(file, unit * UNIT, UNIT, slab.address + unit * UNIT) for unit in range(64)]
    tickets = [submit(backend, rows[low : low + 20]) for low in range(0, 64, 20)]
    for ticket in reversed(tickets):
        backend.wait(ticket)
    assert np.array_equal(slab.array[:FILE_BYTES], data)
    assert backend.counters.reads == 64
    assert backend.counters.read_bytes == FILE_BYTES
    assert backend.counters.retries == 0


def test_ring_wraps(backend: ReadBackend, slab: Slab) -> None:
    data = content(FILE_BYTES)
    file = backend.open(FILE_BYTES)
    write_all(backend, file, data)
    for turn in range(50):
        count = turn % 7 + 1
        slab.array[: 8 * UNIT] = 0
        backend.wait(submit(backend, [(file, turn * UNIT, UNIT, slab.address + n * UNIT) for n in range(count)]))
        for n in range(count):
            assert np.array_equal(slab.array[n * UNIT : (n + 1) * UNIT], data[turn * UNIT : (turn + 1) * UNIT])


def test_no_reads(backend: ReadBackend) -> None:
    ticket = submit(backend, [])
    backend.wait(ticket)
    with pytest.raises(ValueError, match="unknown"):
        backend.wait(ticket)


def test_arrays_may_be_reused_after_submit(backend: ReadBackend, slab: Slab) -> None:
    data = content(FILE_BYTES)
    file = backend.open(FILE_BYTES)
    write_all(backend, file, data)
    columns = [np.full(40, file), np.arange(40) * UNIT, np.full(40, UNIT), slab.address + np.arange(40) * UNIT]
    ticket = backend.submit(*columns)
    for column in columns:
        column[:] = 0
    backend.wait(ticket)
    assert np.array_equal(slab.array[: 40 * UNIT], data[: 40 * UNIT])


def test_read_past_the_end_is_an_error(backend: ReadBackend, slab: Slab) -> None:
    file = backend.open(2 * UNIT)
    write_all(backend, file, content(2 * UNIT))
    good = submit(backend, [(file, 0, UNIT, slab.address)])
    bad = submit(backend, [(file, 0, UNIT, slab.address), (file, UNIT, 2 * UNIT, slab.address + UNIT)])
    with pytest.raises(DiskReadError, match=rf"{2 * UNIT} bytes at offset {UNIT} of KV file {file}.*ended too early"):
        backend.wait(bad)
    backend.wait(good)
    assert backend.counters.retries > 0


def test_read_after_write_sees_the_new_bytes(backend: ReadBackend, slab: Slab) -> None:
    file = backend.open(UNIT)
    for value in (1, 2, 3):
        slab.array[:UNIT] = value
        backend.write(file, 0, slab.array[:UNIT])
        backend.wait(submit(backend, [(file, 0, UNIT, slab.address + UNIT)]))
        assert (slab.array[UNIT : 2 * UNIT] == value).all()


def test_grown_file(backend: ReadBackend, slab: Slab) -> None:
    file = backend.open(UNIT)
    write_all(backend, file, content(UNIT))
    backend.ensure_size(file, 3 * UNIT)
    backend.ensure_size(file, UNIT)
    backend.wait(submit(backend, [(file, 0, 3 * UNIT, slab.address)]))
    assert np.array_equal(slab.array[:UNIT], content(UNIT))
    assert not slab.array[UNIT : 3 * UNIT].any()


def test_misaligned_write_is_refused(backend: ReadBackend, slab: Slab) -> None:
    file = backend.open(UNIT)
    with pytest.raises(ValueError, match="not multiples"):
        backend.write(file, 100, slab.array[:512])
    with pytest.raises(ValueError, match="not multiples"):
        backend.write(file, 0, slab.array[3 : 3 + 512])


def test_close_drains_and_may_be_repeated(backend: ReadBackend, slab: Slab) -> None:
    file = backend.open(FILE_BYTES)
    submit(backend, [(file, 0, UNIT, slab.address)] * 50)
    backend.close()
    slab.array[:UNIT] = 7
    assert (slab.array[:UNIT] == 7).all()
    backend.close()


@pytest.mark.parametrize("name", RINGS)
def test_no_ticket_outlives_its_ring(name: str, tmp_path: Path, slab: Slab) -> None:
    backend = make(name, tmp_path)
    ticket = submit(backend, [(backend.open(UNIT), 0, UNIT, slab.address)])
    backend.close()
    with pytest.raises(ValueError, match="unknown"):
        backend.wait(ticket)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "memory"])
def test_files_are_closed_after_one_whose_close_fails(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make(name, tmp_path)
    assert isinstance(backend, FileBackend)
    files = [backend.open(UNIT) for _ in range(3)]
    mine, closed, close = {backend._fd(file) for file in files}, set(), os.close

    def broken(fd: int) -> None:
        close(fd)
        if fd in mine:
            closed.add(fd)
            raise OSError(errno.EIO, "closing failed")

    monkeypatch.setattr(os, "close", broken)
    with pytest.raises(OSError, match="closing failed"):
        backend.close()
    assert closed == mine
