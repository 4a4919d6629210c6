"""Gives the compiled loops the threads that PyTorch computes with, where those are OpenMP's.

Between two operators those threads spin, so that others of our own would have to share their cores. PyTorch's wheels
bring the runtime along; it is loaded already, and opening it again gives the same one.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch

from kvswap.native.library import library

ENTRIES = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
"""What compilers call, with GNU's names, which LLVM's runtime has as well."""


@lru_cache
def threaded_library() -> ctypes.CDLL | None:
    """The compiled functions, which have been told of the threads; None where there are none."""
    found, runtime = library(), openmp()
    if found is not None and runtime is not None:
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
