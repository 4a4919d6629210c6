"""Loading of a model for a command."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvswap.models.loading import LoadedModel


def load_weights(model: str, display: Any, *, dtype: str, mmap: bool = True) -> LoadedModel:
    """Load a model with what a command shows and does not show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it would warn about the thread that generates
    with _without_collection():
        from kvswap.models.loading import load_model, quieten

        quieten()
        return load_model(model, dtype=dtype, mmap=mmap, on_notice=display.notice)


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Imports make objects by the hundred thousand; looking for garbage among them costs a sixth of the start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
