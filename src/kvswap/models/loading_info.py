"""What transformers reports about the tensors it loaded: which are missing, which are not used.

``loading`` and both makers of models from GGUF files ask for it. transformers fills a missing tensor with random
numbers and goes on.
"""

from __future__ import annotations

from typing import Any

from kvswap.errors import ModelError

_COMPUTED = ("rotary_emb.inv_freq", "attn.masked_bias")
"""Endings of tensors of old checkpoints that models compute themselves."""
_NAMED = 3


def check_weights(name: str, info: dict[str, Any]) -> None:
    """Raise ModelError where a tensor of the model is not in the checkpoint. Tied tensors are not missing.

    ``info`` is what ``from_pretrained`` gives with ``output_loading_info``.
    """
    missing = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if missing:
        others = sorted(info["unexpected_keys"])
        instead = f"; it has {some_of(others)} instead" if others else ""
        raise ModelError(
            f"model {name}: its weights lack {count_of(missing)}: {some_of(missing)}{instead}",
            hint="the checkpoint is incomplete or of another family than its config.json says: fetch it again",
        )


def unused_weights(name: str, info: dict[str, Any]) -> str | None:
    """A sentence about tensors of the checkpoint that the model does not use; None where it uses all."""
    unused = sorted(key for key in info["unexpected_keys"] if not key.endswith(_COMPUTED))
    return f"model {name}: {count_of(unused)} of its weights not used: {some_of(unused)}" if unused else None


def count_of(names: list[str]) -> str:
    """How many tensors, in words."""
    return f"{len(names):,} tensor{'s' if len(names) > 1 else ''}"


def some_of(names: list[str]) -> str:
    """The first names of a list."""
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")
