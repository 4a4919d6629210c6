"""The methods by name. Loads nothing heavy; a method's file is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvswap.errors import ConfigError

if TYPE_CHECKING:
    from kvswap.layer_major import FullCache
    from kvswap.method import Method

DISK = {
    "kvswap": "kvswap.baselines.kvswap:method",
    "kvswap-paper": "kvswap.baselines.kvswap_paper:method",
    "infinigen": "kvswap.baselines.infinigen:per_head",
    "infinigen*": "kvswap.baselines.infinigen:joined",
    "infinigen*+reuse": "kvswap.baselines.infinigen:joined_with_reuse",
    "loki": "kvswap.baselines.loki:method",
    "shadowkv": "kvswap.baselines.shadowkv:method",
    "quest": "kvswap.baselines.quest:method",
    "reload": "kvswap.baselines.reload:method",
    "window": "kvswap.baselines.window:method",
}
"""Factories of ``Method``: these keep K and V on disk, under the memory limit."""

MEMORY = {
    "full": "kvswap.baselines.full:open_cache",
    "mmap": "kvswap.baselines.mmap:open_cache",
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
