"""Chooses the fastest backend that this disk and this process allow. Each fallback is a notice with its reason."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from kvswap.config import BACKENDS
from kvswap.disk.backend import ReadBackend
from kvswap.disk.buffered_backend import BufferedBackend
from kvswap.disk.direct import probe_direct
from kvswap.disk.files import prepare_dir, raise_open_files
from kvswap.disk.memory_backend import MemoryBackend
from kvswap.disk.threads_backend import ThreadsBackend
from kvswap.disk.uring_backend import UringBackend, probe_uring, why
from kvswap.errors import StorageError

log = logging.getLogger("kvswap")


def create_backend(name: str, directory: str | Path, depth: int, *, on_notice: Callable[[str], None]) -> ReadBackend:
    """A backend on ``directory``, which is created, with at most ``depth`` reads in flight.

    ``"auto"`` is uring where it works, else threads, else buffered. ``on_notice`` gets a sentence for each fallback;
    ``.name`` and ``.direct`` of the result say what was chosen. Any other name is that backend. Raises StorageError
    with the reason where it does not work.
    """
    backend = _create(name, directory, depth, on_notice)
    log.debug("backend %s%s in %s", backend.name, " with direct I/O" if backend.direct else "", directory)
    return backend


def _create(name: str, directory: str | Path, depth: int, on_notice: Callable[[str], None]) -> ReadBackend:
    raise_open_files()
    if name not in BACKENDS:
        raise StorageError(f"backend {name!r} is unknown", hint=f"use one of {', '.join(BACKENDS)}")
    if name == "memory":
        return MemoryBackend()
    folder = prepare_dir(directory)
    if name == "buffered":
        return BufferedBackend(folder, depth)
    probe = probe_direct(folder)
    if not probe.ok:
        reason = f"direct I/O does not work in {folder}: {probe.reason}"
        if name != "auto":
            raise StorageError(f"backend {name}: {reason}", hint='use backend="buffered" or another kv_dir')
        log.debug("%s", reason)
        on_notice(f"{reason}. Reads go through the page cache, whose memory is not under the limit.")
        return BufferedBackend(folder, depth)
    alignment_bytes = max(probe.alignment_bytes, probe.memory_alignment_bytes)
    if name != "threads":
        works, reason = probe_uring()
        if works:
            try:
                return UringBackend(folder, alignment_bytes, depth)
            except OSError as error:  # a small ring was allowed, one of ``depth`` is not
                reason = f"a ring for {depth} reads: {why(error)}"
        if name == "uring":
            raise StorageError(f"backend uring: io_uring cannot be used here: {reason}", hint='use backend="threads"')
        log.debug("io_uring cannot be used here: %s", reason)
        on_notice(f"io_uring cannot be used here ({reason}). Reads go through threads, which is slower.")
    return ThreadsBackend(folder, alignment_bytes, depth)
