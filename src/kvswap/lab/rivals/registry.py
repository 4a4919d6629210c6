"""The methods by name. A method's file is imported when ``find`` is called, so that importing this loads no torch."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from kvswap.config import Config
from kvswap.errors import ConfigError

if TYPE_CHECKING:
    from kvswap.core.layer_major import InMemory
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
    "full": "kvswap.lab.rivals.full:method",
    "mmap": "kvswap.lab.rivals.mmap:method",
}
"""Factories of ``InMemory``: these have no memory limit."""

NAMES = (*DISK, *MEMORY)


def check_name(name: str) -> None:
    """Raise ConfigError unless there is a method of this name."""
    if name not in NAMES:
        raise ConfigError(f"method: got {name!r}", hint=f"use one of {', '.join(NAMES)}")


def find(name: str) -> Method | InMemory:
    """The method of a name, for ``kvswap.attach`` and ``kvswap.load``. Raises ConfigError where there is none."""
    check_name(name)
    module, _, factory = {**DISK, **MEMORY}[name].partition(":")
    method: Method | InMemory = getattr(importlib.import_module(module), factory)()
    return method


def find_on_disk(name: str) -> Method:
    """The method of a name in ``DISK``. Raises ConfigError where there is none."""
    method = find(name)
    if name not in DISK:
        raise ConfigError(f"method: {name} keeps K, V in memory", hint=f"use one of {', '.join(DISK)}")
    return cast("Method", method)


def with_methods(variants: Iterable[tuple[str, Config]]) -> list[tuple[Method | InMemory | None, Config]]:
    """Names of methods and configurations as ``attach_each`` takes them. Raises ConfigError."""
    return [(find(name), config) for name, config in variants]
