"""Load a model for a command, with its progress and notices on the command's display."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvswap.models.loading import LoadedModel


def load_weights(model: str, display: Any, *, weights: str, no_mmap: bool, dtype: str = "auto") -> LoadedModel:
    """Load a model. Notices go to ``display``; progress and warnings of transformers are silenced."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise it warns about the generating thread
    with _without_collection():
        from kvswap.models.loading import load_model, quieten

        quieten()
        return load_model(model, dtype=dtype, weights=weights, mmap=not no_mmap, on_notice=display.notice)


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Pause garbage collection: scanning the many objects that imports create takes a sixth of the start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
