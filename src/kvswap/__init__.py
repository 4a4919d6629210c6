"""Language models over contexts whose KV cache lives on disk. Importing this loads nothing heavy; names come on use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvswap.app.engine import Engine, load
    from kvswap.config import Config
    from kvswap.core.attach import attach
    from kvswap.errors import KVSwapError
    from kvswap.sessions.session import Session
    from kvswap.tuning.tune import tune

__all__ = ["Config", "Engine", "KVSwapError", "Session", "attach", "load", "tune"]

_HOMES = {
    "Config": "kvswap.config",
    "Engine": "kvswap.app.engine",
    "KVSwapError": "kvswap.errors",
    "attach": "kvswap.core.attach",
    "Session": "kvswap.sessions.session",
    "load": "kvswap.app.engine",
    "tune": "kvswap.tuning.tune",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("kvswap")
    if name not in _HOMES:
        raise AttributeError(f"module 'kvswap' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
