"""What tells that stored bytes are what was written: checksums, or authenticated encryption (docs/file-format.md).

A ``Sealer`` seals groups as they are written, unseals them as they are read, and wraps the small files of a session.
``Checksums`` leaves bytes as they are and finds damage; ``sessions.encryption.Cipher`` encrypts them. One thread.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvswap.native.arrays import ByteArray, IntArray
from kvswap.sessions.arrays import Arrays, take
from kvswap.store.group_seals import GroupSealer, Seals


class Sealer(GroupSealer, Protocol):
    """What a session needs beside what the group store does (``GroupSealer``)."""

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
    """Leaves bytes as they are. A seal is a checksum: XXH3 of 64 bits."""

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
        sums = take(arrays, "sums", np.uint64, what)
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


def group_sums(groups: ByteArray) -> NDArray[np.uint64]:
    """The checksum of each row of ``groups`` ``(n, bytes)``, whose rows are contiguous: uint64 ``(n,)``."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, groups), np.uint64, len(groups))


def text_sum(data: bytes | memoryview) -> str:
    """The checksum of ``data`` as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)
