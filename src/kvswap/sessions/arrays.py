"""Named arrays as bytes (safetensors), and the error for bytes that are not what was written.

Decoding takes no more memory than a small multiple of the bytes given. Pure.
"""

from __future__ import annotations

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from kvswap.errors import DamagedError

Arrays = dict[str, NDArray[np.generic]]


def encode_arrays(arrays: Arrays) -> bytes:
    """A safetensors file."""
    data: bytes = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return data


def decode_arrays(data: bytes, label: str) -> Arrays:
    """The arrays of a safetensors file; ``label`` names it in messages. Raises DamagedError."""
    try:
        found: Arrays = safetensors.numpy.load(data)
        return found
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise damaged(label, str(error)) from error


def take(arrays: Arrays, name: str, dtype: type, label: str, size: int | None = None) -> NDArray[np.generic]:
    """One array, which must have that dtype, one dimension and, where given, ``size`` elements. Raises DamagedError."""
    found = arrays.get(name)
    if found is None or found.dtype != np.dtype(dtype) or found.ndim != 1 or (size is not None and found.size != size):
        raise damaged(label, f"{name} is missing, or has another type or size")
    return found


def damaged(label: str, why: str) -> DamagedError:
    """The error for a session that is not what was written; ``label`` is "session NAME", perhaps with a file."""
    words = label.split(":")[0].split()
    name = f" {words[-1]}" if words and words[0] == "session" else ""
    return DamagedError(f"{label} is damaged: {why}", hint=f"try: kvswap sessions repair{name}")
