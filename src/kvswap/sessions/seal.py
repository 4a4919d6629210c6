"""What tells that stored bytes are what was written: checksums, or authenticated encryption (docs/file-format.md).

A ``Sealer`` seals groups as they are written, unseals them as they are read, and wraps the small files of a session.
``Checksums`` leaves bytes as they are and finds damage; ``sessions.encryption.Cipher`` encrypts them. One thread.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvswap.errors import DamagedError
from kvswap.native.arrays import ByteArray, IntArray
from kvswap.store.checksum import group_sums

Seals = NDArray[Any]
Arrays = dict[str, NDArray[np.generic]]


class Sealer(Protocol):
    """Seals are arrays of ``dtype``, one entry a group. ``slots`` are uint8 ``(n, group_bytes)``, rows contiguous."""

    dtype: np.dtype[Any]
    encrypts: bool

    def begin(self) -> None:
        """A new stretch of writing groups begins."""

    def seal(self, layer: int, first: int, slots: ByteArray) -> Seals:
        """Seal groups from ``first`` on in place."""

    def unseal(
        self, layers: IntArray, groups: IntArray, slots: ByteArray, seals: Seals, places: IntArray | None = None
    ) -> Any:
        """Turn sealed groups into what was written, in place; which are so, bool ``(n,)``.

        They are the rows ``places`` of ``slots``, or all.
        """

    def authentic(self, layer: int, first: int, slots: ByteArray, seals: Seals) -> Any:
        """Which groups from ``first`` on are what was written, bool ``(n,)``; they stay sealed."""

    def pack(self, seals: Seals) -> Arrays:
        """Seals as arrays for an index."""

    def unpack(self, arrays: Arrays, what: str) -> Seals:
        """The same back. Raises DamagedError."""

    def wrap(self, data: bytes, name: str) -> bytes:
        """A small file as it is stored under a name."""

    def unwrap(self, data: bytes, name: str, what: str) -> bytes:
        """The same back. Raises DamagedError."""

    def sign(self, body: bytes) -> str:
        """What authenticates a manifest; empty where nothing does."""


class Checksums:
    """ByteArray as they are, with XXH3 of 64 bits."""

    dtype: np.dtype[Any] = np.dtype(np.uint64)
    encrypts = False

    def begin(self) -> None:
        """Nothing to begin."""

    def seal(self, layer: int, first: int, slots: ByteArray) -> Seals:
        """Checksums of groups, uint64 ``(n,)``."""
        return group_sums(slots)

    def unseal(
        self, layers: IntArray, groups: IntArray, slots: ByteArray, seals: Seals, places: IntArray | None = None
    ) -> Any:
        """Which groups have their checksum."""
        return group_sums(slots if places is None else slots[places]) == seals

    def authentic(self, layer: int, first: int, slots: ByteArray, seals: Seals) -> Any:
        """Which groups have their checksum."""
        return group_sums(slots) == seals

    def pack(self, seals: Seals) -> Arrays:
        """One array."""
        return {"sums": seals}

    def unpack(self, arrays: Arrays, what: str) -> Seals:
        """One array."""
        sums = _take(arrays, "sums", np.uint64, what)
        return sums.astype(np.uint64, copy=False)

    def wrap(self, data: bytes, name: str) -> bytes:
        """As it is."""
        return data

    def unwrap(self, data: bytes, name: str, what: str) -> bytes:
        """As it is."""
        return data

    def sign(self, body: bytes) -> str:
        """Nothing."""
        return ""


def _take(arrays: Arrays, name: str, dtype: type, what: str) -> NDArray[np.generic]:
    found = arrays.get(name)
    if found is None or found.dtype != np.dtype(dtype) or found.ndim != 1:
        raise _damaged(what, f"{name} is missing or of another kind")
    return found


def _damaged(what: str, why: str) -> DamagedError:
    return DamagedError(f"{what} is damaged: {why}", hint="try: kvswap sessions repair")
