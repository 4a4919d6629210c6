"""Language models over contexts whose KV cache lives on disk, under a memory limit that you set.

Importing this loads neither torch nor transformers; a name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvswap.app.documents import Document
    from kvswap.app.engine import Engine, load
    from kvswap.app.stats import RunStats
    from kvswap.config import Config
    from kvswap.core.attach import attach
    from kvswap.core.cache_stats import CacheStats
    from kvswap.errors import (
        ConfigError,
        DamagedError,
        DiskError,
        InputError,
        KVSwapError,
        MemoryBudgetError,
        ModelError,
        OpenFilesError,
        SessionError,
        StorageError,
        UnsupportedError,
    )
    from kvswap.models.loading import LoadedModel, load_model
    from kvswap.models.sampling import Sampling
    from kvswap.sessions.quota import Limits
    from kvswap.sessions.session import Session
    from kvswap.tuning.tune import tune

_MODULES = {
    "kvswap.app.documents": ("Document",),
    "kvswap.app.engine": ("Engine", "load"),
    "kvswap.app.stats": ("RunStats",),
    "kvswap.config": ("Config",),
    "kvswap.core.attach": ("attach",),
    "kvswap.core.cache_stats": ("CacheStats",),
    "kvswap.errors": (
        "ConfigError",
        "DamagedError",
        "DiskError",
        "InputError",
        "KVSwapError",
        "MemoryBudgetError",
        "ModelError",
        "OpenFilesError",
        "SessionError",
        "StorageError",
        "UnsupportedError",
    ),
    "kvswap.models.loading": ("LoadedModel", "load_model"),
    "kvswap.models.sampling": ("Sampling",),
    "kvswap.sessions.quota": ("Limits",),
    "kvswap.sessions.session": ("Session",),
    "kvswap.tuning.tune": ("tune",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "CacheStats",
    "Config",
    "ConfigError",
    "DamagedError",
    "DiskError",
    "Document",
    "Engine",
    "InputError",
    "KVSwapError",
    "Limits",
    "LoadedModel",
    "MemoryBudgetError",
    "ModelError",
    "OpenFilesError",
    "RunStats",
    "Sampling",
    "Session",
    "SessionError",
    "StorageError",
    "UnsupportedError",
    "attach",
    "load",
    "load_model",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("kvswap")
    if name not in _HOMES:
        raise AttributeError(f"module 'kvswap' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
