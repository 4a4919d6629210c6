"""Models whose weights are mapped from a file: whether it is still that file is looked at before they are read.

The system ends a process that reads a page which its file no longer has. ``watch`` makes every forward of a model look
first, at the cost of one call to the system a file, so a file that was cut off or written over is an error between two
steps. ``check_files`` does so where weights are read outside a forward. One thread.
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
    """Raise ModelError in every forward from now on where one of ``files`` was changed."""
    model.get_decoder().register_forward_pre_hook(_Watch(files))


def check_files(model: PreTrainedModel) -> None:
    """Raise ModelError where a file that ``model`` is watched for was changed; nothing for other models."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    for hook in getattr(decoder, "_forward_pre_hooks", {}).values():
        if isinstance(hook, _Watch):
            hook.files.check_unchanged()
