"""Finds and loads what ``kernels.c`` was compiled to. Loads nothing slow itself."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import lru_cache

VERSION = 4
"""Of the functions' arguments; ``kernels.c`` must have the same."""

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


@lru_cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where there are none, or those of an older source."""
    spec = importlib.util.find_spec("kvswap.native._kernels")
    if spec is None or spec.origin is None:
        return None
    try:
        found = ctypes.CDLL(spec.origin)
        version = found.kvswap_version
        version.argtypes, version.restype = (), _INT
        if version() != VERSION:
            return None
        mass, top, gather = found.kvswap_group_mass, found.kvswap_top_groups, found.kvswap_gather
    except (OSError, AttributeError):
        return None
    mass.argtypes = (_POINTER, _INT, _INT, _INT, _POINTER, _POINTER, _INT, _INT, _INT, _POINTER, _POINTER, _POINTER)
    mass.restype = None
    coarse = found.kvswap_tile_mass
    coarse.argtypes = (_POINTER, _INT, _INT, _INT, _POINTER, _POINTER, _INT, _INT, _POINTER, _POINTER)
    coarse.restype = None
    top.argtypes = (_POINTER, _INT, _INT, _INT, _POINTER, _POINTER)
    top.restype = _INT
    gather.argtypes = (_POINTER, _INT, _POINTER, _INT, _INT, _INT, _INT, _POINTER)
    gather.restype = None
    return found
