"""Checksums of what is stored: XXH3 of 64 bits. They find damage, not deceit."""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray


def group_sums(groups: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Checksum of each row of ``groups`` ``(n, bytes)``, whose rows are contiguous: uint64 ``(n,)``."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, groups), np.uint64, len(groups))


def text_sum(data: bytes | memoryview) -> str:
    """Checksum of ``data`` as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)
