"""The methods by name. Loads nothing heavy; a method's file is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvswap.errors import ConfigError

if TYPE_CHECKING:
    from kvswap.core.layer_major import FullCache
    from kvswap.selection.method import Method

DISK = {
    "kvswap": "kvswap.selection.kvswap:method",
    "kvswap-paper": "kvswap.lab.rivals.kvswap_paper:method",
    "infinigen": "kvswap.lab.rivals.infinigen:per_head",
    "infinigen*": "kvswap.lab.rivals.infinigen:joined",
    "infinigen*+reuse": "kvswap.lab.rivals.infinigen:joined_with_reuse",
    "loki": "kvswap.lab.rivals.loki:method",
    "shadowkv": "kvswap.lab.rivals.shadowkv:method",
    "quest": "kvswap.lab.rivals.quest:method",
    "reload": "kvswap.lab.rivals.reload:method",
    "window": "kvswap.lab.rivals.window:method",
}
"""Factories of ``Method``: these keep K and V on disk, under the memory limit."""

MEMORY = {
    "full": "kvswap.lab.rivals.full:open_cache",
    "mmap": "kvswap.lab.rivals.mmap:open_cache",
}
"""Functions that open a cache of their own, without a memory limit."""

NAMES = (*DISK, *MEMORY)


def check_name(name: str) -> None:
    """Raise ConfigError unless there is a method of this name."""
    if name not in NAMES:
        raise ConfigError(f"method: got {name!r}", hint=f"use one of {', '.join(NAMES)}")


def find(name: str) -> Method:
    """The method of a name in ``DISK``."""
    method: Method = _load(DISK[name])()
    return method


def opener(name: str) -> Callable[..., FullCache]:
    """What opens the cache of a name in ``MEMORY``."""
    function: Callable[..., FullCache] = _load(MEMORY[name])
    return function


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
