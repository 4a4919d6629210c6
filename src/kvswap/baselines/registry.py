"""The methods by name. Loads nothing heavy; a method's file is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from kvswap.errors import ConfigError

if TYPE_CHECKING:
    from kvswap.method import Method

DISK = {
    "kvswap": "kvswap.baselines.kvswap:method",
    "kvswap-paper": "kvswap.baselines.kvswap_paper:method",
    "window": "kvswap.baselines.window:method",
}
"""Factories of ``Method``: these keep K and V on disk, under the memory limit."""

MEMORY = ("full",)
"""Methods without a memory limit."""

NAMES = (*DISK, *MEMORY)


def check_name(name: str) -> None:
    """Raise ConfigError unless there is a method of this name."""
    if name not in NAMES:
        raise ConfigError(f"method: got {name!r}", hint=f"use one of {', '.join(NAMES)}")


def find(name: str) -> Method:
    """The method of a name in ``DISK``. Raises ConfigError."""
    check_name(name)
    module, _, factory = DISK[name].partition(":")
    method: Method = getattr(importlib.import_module(module), factory)()
    return method
