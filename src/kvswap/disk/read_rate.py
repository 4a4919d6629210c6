"""How many small reads a disk answers in a second, measured once for each disk and backend, and kept.

What is kept gives the same number to every later run on this machine, so that nothing that depends on it changes from
run to run. Removing the file ``disks.json`` in the cache folder has it measured again. Any thread.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from kvswap.disk.choose_backend import create_backend
from kvswap.disk.folders import home
from kvswap.disk.json_files import write_json
from kvswap.disk.slab import Slab
from kvswap.errors import KVSwapError
from kvswap.units import KIB, MIB

FILE_BYTES = 16 * MIB
READ_BYTES = 4 * KIB
READS, ROUNDS = 512, 3
_log = logging.getLogger("kvswap")


def reads_per_s(backend: str, folder: Path, *, measure: Callable[[str, Path], float] | None = None) -> float:
    """Random reads of 4 KiB a second of the disk under ``folder``, which exists; 0 where it cannot be measured.

    ``measure(backend, folder)`` does it where nothing is kept.
    """
    try:
        return _kept(f"{os.stat(folder).st_dev:x} {backend}", backend, folder, measure or measured)
    except (KVSwapError, OSError) as error:
        _log.debug("the disk under %s was not measured: %s", folder, error)
        return 0.0


def measured(backend: str, folder: Path) -> float:
    """The best of a few rounds of reads at random, many at a time. Raises StorageError, DiskError."""
    reader, slab = create_backend(backend, folder, READS, on_notice=_log.debug), Slab(READS * READ_BYTES)
    try:
        file, chance = reader.open(FILE_BYTES), np.random.default_rng(0)
        slab.array[:] = chance.integers(0, 256, slab.array.size, dtype=np.uint8)
        for start in range(0, FILE_BYTES, READS * READ_BYTES):
            reader.write(file, start, slab.array[: READS * READ_BYTES])
        files, lengths = np.full(READS, file, np.int64), np.full(READS, READ_BYTES, np.int64)
        addresses, best_s = slab.address + READ_BYTES * np.arange(READS), float("inf")
        for _ in range(ROUNDS):
            offsets = READ_BYTES * chance.integers(0, FILE_BYTES // READ_BYTES, READS)
            started_s = time.perf_counter()
            reader.wait(reader.submit(files, offsets, lengths, addresses))
            best_s = min(best_s, time.perf_counter() - started_s)
        return READS / best_s
    finally:
        reader.close()  # before the slab: no read may be in flight when its memory goes
        slab.close()


@lru_cache(maxsize=64)
def _kept(disk: str, backend: str, folder: Path, measure: Callable[[str, Path], float]) -> float:
    path = home() / "disks.json"
    known = _read(path)
    if disk not in known:
        rate = measure(backend, folder)
        _log.debug("disk %s: %.0f reads a second", disk, rate)
        known = {**_read(path), disk: round(rate)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, known)
        except (KVSwapError, OSError) as error:  # it is measured again the next time
            _log.debug("the rate of disk %s is not kept: %s", disk, error)
    return float(known[disk])


def _read(path: Path) -> dict[str, float]:
    """What is kept; nothing where the file is missing or something else."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {disk: rate for disk, rate in found.items() if isinstance(rate, int | float) and rate >= 0}
