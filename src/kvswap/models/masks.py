"""Attention masks, made when a layer knows what it needs.

transformers makes one mask per forward, before any layer runs: T x T for a padded prompt, 1 GiB at 32K. While a model
is attached, ``DeferredMask`` goes through the model in the mask's place. Each layer then makes the mask of one chunk
with the model's own mask function, or, where the cache is not ours, the mask the model would have had.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

NAME = "kvswap"


@dataclass(slots=True, eq=False)
class DeferredMask:
    """What the model asked its mask function for."""

    arguments: dict[str, Any]
    _stock: dict[str, Any] = field(default_factory=dict)

    @property
    def padding(self) -> torch.Tensor | None:
        """``[B, tokens]`` bool, True where there is a token; None when there is no padding."""
        mask: torch.Tensor | None = self.arguments["attention_mask"]
        return mask

    def stock(self, implementation: str) -> Any:
        """The mask that the model's original attention gets; made once."""
        if implementation not in self._stock:
            self._stock[implementation] = _mask_function(implementation)(**self.arguments)
        return self._stock[implementation]

    def chunk(self, implementation: str, *, q_offset: int, q_length: int, sizes: tuple[int, int]) -> Any:
        """The mask of ``q_length`` queries from ``q_offset`` on; ``sizes`` is the layer's (kv length, offset)."""
        kv_length, kv_offset = sizes
        changed = {"q_offset": q_offset, "q_length": q_length, "kv_length": kv_length, "kv_offset": kv_offset}
        return _mask_function(implementation)(**{**self.arguments, **changed})


def defer_mask(**arguments: Any) -> DeferredMask:
    """The mask function registered under our name."""
    arguments.setdefault("attention_mask", None)
    return DeferredMask(arguments)


def resolve(mask: Any, implementation: str) -> Any:
    """The stock mask where ``mask`` is deferred, else ``mask`` itself."""
    return mask.stock(implementation) if isinstance(mask, DeferredMask) else mask


def _mask_function(implementation: str) -> Any:
    known = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    return known.get(implementation, _no_mask)


def _no_mask(**_: Any) -> None:
    """What transformers does for attention functions that have no mask function."""
