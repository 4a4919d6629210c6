"""Models whose weights are mapped from a file: before weights are read, kvswap checks that the file is unchanged.

The system ends a process that reads a page which its file no longer has. With ``watch``, every forward of a model
checks first. This costs one call to the system for each file, and a file that was cut off or written over is an error
between two steps. ``check_files`` checks where weights are read outside a forward. One thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from kvswap.weights.gguf_file import MappedFiles


@dataclass(frozen=True)  # without slots, so that ``core/model_state.py`` can tell that it is still the same
class _Watch:
    """The hook of a decoder."""

    files: MappedFiles

    def __call__(self, module: Any, arguments: Any) -> None:
        self.files.check_unchanged()


def watch(model: PreTrainedModel, files: MappedFiles) -> None:
    """Have every forward from now on raise ModelError if one of ``files`` was changed."""
    model.get_decoder().register_forward_pre_hook(_Watch(files))


def check_files(model: PreTrainedModel) -> None:
    """Raise ModelError if a file that ``watch`` was called with was changed. Other models pass."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    for hook in getattr(decoder, "_forward_pre_hooks", {}).values():
        if isinstance(hook, _Watch):
            hook.files.check_unchanged()
