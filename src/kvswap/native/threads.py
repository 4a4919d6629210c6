"""Gives the compiled loops the threads that PyTorch computes with, where those belong to OpenMP.

Between two operators these threads spin, so threads of our own would have to share cores with them. PyTorch's wheels
contain the OpenMP runtime. It is loaded already, and opening it again gives the same one.
"""

from __future__ import annotations

import ctypes
import logging
from functools import lru_cache
from pathlib import Path

import torch

from kvswap.native.library import required_library

log = logging.getLogger("kvswap")

ENTRIES = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
"""Entry points that compilers call, by GNU's names; LLVM's runtime has them too."""


@lru_cache
def threaded_library() -> ctypes.CDLL:
    """The compiled functions, which know the threads of OpenMP where there are any. Raises RuntimeError."""
    found, runtime = required_library(), openmp()
    if runtime is None:
        log.debug("no OpenMP runtime of PyTorch was found: compiled loops use one thread")
    else:
        found.kvswap_use_threads(*(ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in ENTRIES))
    return found


def openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that came with PyTorch, or None."""
    home = Path(torch.__file__).parent
    for folder in (home / "lib", home.with_name("torch.libs")):
        for path in sorted((*folder.glob("libgomp*.so*"), *folder.glob("libomp*"))):
            try:
                runtime = ctypes.CDLL(str(path))
                if all(hasattr(runtime, name) for name in ENTRIES):
                    return runtime
            except OSError:
                continue
    return None
