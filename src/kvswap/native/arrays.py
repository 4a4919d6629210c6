"""Types of the arrays that compiled loops and everything above them pass on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
"""Numbers of groups, slots, files and tokens, and offsets in bytes."""
BoolArray = NDArray[np.bool_]
ByteArray = NDArray[np.uint8]
"""Bytes as they are on disk."""
