"""How groups are sealed, so that a read tells whether they are what was written.

A seal is a checksum, or the tag of authenticated encryption. ``sessions/seal.py`` has the one, and
``sessions/encryption.py`` the other. Imports no torch.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvswap.native.arrays import ByteArray, IntArray

Seals = NDArray[Any]


class GroupSealer(Protocol):
    """Seals groups. Seals are arrays of ``dtype``, one entry for each group."""

    dtype: np.dtype[Any]
    encrypts: bool

    def begin(self) -> None:
        """A new run of writing groups begins."""

    def seal(self, layer: int, first: int, slots: ByteArray) -> Seals:
        """Seal the groups of a layer from ``first`` on, in place: uint8 ``(n, group_bytes)``."""

    def unseal(
        self, layers: IntArray, groups: IntArray, slots: ByteArray, seals: Seals, places: IntArray | None = None
    ) -> Any:
        """Turn sealed groups into what was written, in place; bool ``(n,)`` tells which ones are intact.

        They are the rows ``places`` of ``slots``, or all of them.
        """
