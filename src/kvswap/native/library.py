"""Finds and loads what the C sources here were compiled to. Imports nothing slow; any thread."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from functools import lru_cache

VERSION = 18
"""Version of the functions' arguments; ``kernels.c`` must have the same."""

log = logging.getLogger("kvswap")

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float  # a pointer, numbers
_SIGNATURES: dict[str, tuple[tuple[type, ...], type | None]] = {
    "use_threads": ((_P, _P, _P), None),
    "group_mass": ((_P, _I, _I, _I, _I, _P, _P, _I, _I, _P, _I, _P, _I, _I, _P, _P, _I), _I),
    "scratch_floats": ((_I, _I, _I, _I, _I, _I, _I), _I),
    "tile_mass": ((_P, _I, _I, _I, _P, _P, _I, _I, _I, _P, _P), None),
    "rms_norm": ((_P, _P, _I, _I, _F, _F, _P), None),
    "rotate": ((_P, _P, _P, _I, _I, _I, _I, _P), None),
    "project": ((_P, _P, _I, _I, _I, _I, _I, _F, _P), None),
    "top_groups": ((_P, _I, _I, _I, _P, _I, _P, _P), None),
    "lookup": ((_P, _I, _I, _P, _P, _I, _I, _I, _P, _I, _P, _P, _P), _I),
    "find": ((_P, _I, _I, _I, _P, _I, _I, _P, _I, _I, _P, _I, _P, _P, _I, _I, _I, _I, _I, _P), _I),
    "plan_reads": ((_P, _P, _I, _I, _I, _P, _P, _P, _P, _P, _P), _I),
    "locate": ((_P, _P, _P, _I, _I, _P, _P, _P, _P, _I, _I, _I, _P), _I),
    "admit": ((_P, _I, _I, _P, _P, _P, _P, _I, _I, _I, _P, _I, _I, _P, _P, _I, _P, _P, _I, _I), _I),
    "gather": ((_P, _I, _I, _P, _I, _I, _I, _I, _I, _I, _P), _I),
    "attending_floats": ((_I, _I, _I, _I), _I),
    "attend_groups": ((_P, _I, _I, _P, _I, _I, _I, _I, _I, _P, _I, _I, _P, _P, _P, _P), _I),
    "step_bytes": ((_P, _I, _I), _I),
    "step_query": ((_P, _P, _P, _P), _I),
    "choose_floats": ((_P, _P, _P, _I), _I),
    "step_fetch": ((_P, _P, _P, _P, _I, _I, _P, _I, _P, _I, _P, _I, _I, _I, _P), _I),
    "attended": ((_P, _I, _P, _P, _P, _I, _P, _P), _I),
    "run_floats": ((_P, _P), _I),
    "step_run": ((_P, _P), _I),
    "step_begin": ((_P, _P, _P, _P, _P, _P), _I),
    "step_finish": ((_P, _P, _P, _P, _P, _I, _P, _P), _I),
    "ring_submit": ((_P, _I, _I, _I), _I),
    "ring_collect": ((_P, _I), _I),
    "row_bytes": ((_I, _I), _I),
    "activation_kind": ((_I,), _I),
    "activation_bytes": ((_I, _I), _I),
    "packed_linear": ((_P, _P, _I, _P, _P, _I, _P, _I), _I),
    "unpack": ((_P, _I, _I, _P, _I, _I), _I),
    "put_tokens": ((_P, _I, _I, _P, _P, _I, _I, _I, _I, _I, _P, _P, _P), _I),
}
"""Arguments and result of each function; in C its name begins with ``kvswap_``."""


@lru_cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where nothing was compiled, or an older source. The reason is logged."""
    spec = importlib.util.find_spec("kvswap.native._kernels")
    if spec is None or spec.origin is None:
        log.debug("compiled loops are missing: plain NumPy and torch are used instead")
        return None
    try:
        found = ctypes.CDLL(spec.origin)
        version = found.kvswap_version
        version.argtypes, version.restype = (), _I
        if version() != VERSION:
            log.debug("compiled loops have version %d instead of %d: they are not used", version(), VERSION)
            return None
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(found, f"kvswap_{name}")
            function.argtypes, function.restype = arguments, result
    except (OSError, AttributeError) as error:
        log.debug("compiled loops cannot be loaded: %s", error)
        return None
    return found


def available() -> bool:
    """Whether there are compiled functions, and those that this source expects."""
    return library() is not None


@lru_cache
def required_library() -> ctypes.CDLL:
    """The compiled functions. Raises RuntimeError where there are none: callers ask ``available`` first."""
    found = library()
    if found is None:
        raise RuntimeError("the compiled loops are missing")
    return found
