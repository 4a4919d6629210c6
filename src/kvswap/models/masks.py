"""Attention masks that are built chunk by chunk, when a layer runs.

transformers makes one mask per forward, before any layer runs: T x T for a padded prompt, 1 GiB at 32K. While a model
is attached, ``DeferredMask`` goes through the model instead of the mask. Each layer then builds the mask of one chunk
with the model's own mask function. Where the cache is not ours, it builds the mask that the model would have had.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from kvswap.errors import UnsupportedError

NAME = "kvswap"


@dataclass(slots=True, eq=False)
class DeferredMask:
    """The arguments that the model gave its mask function."""

    arguments: dict[str, Any]
    _stock: dict[str, Any] = field(default_factory=dict)
    _band: torch.Tensor | None = None

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

    def chunk(
        self, implementation: str, *, q_offset: int, q_length: int, sizes: tuple[int, int], dtype: torch.dtype
    ) -> Any:
        """The mask of ``q_length`` queries from ``q_offset`` on; ``sizes`` is the layer's (kv length, offset).

        ``dtype`` is that of the queries.
        """
        kv_length, kv_offset = sizes
        if kv_length > q_length > 1 and kv_offset == 0 and implementation == "sdpa" and self._is_plain():
            return self._lower_right(q_length, kv_length, dtype)
        changed = {"q_offset": q_offset, "q_length": q_length, "kv_length": kv_length, "kv_offset": kv_offset}
        return _mask_function(implementation)(**{**self.arguments, **changed})

    def _is_plain(self) -> bool:
        """Whether this is a causal mask and nothing else, on a CPU."""
        asked = self.arguments
        return (
            asked.get("mask_function") is causal_mask_function
            and torch.device(asked.get("device", "cpu")).type == "cpu"
            and (self.padding is None or bool(self.padding.all()))
        )

    def _lower_right(self, q_length: int, kv_length: int, dtype: torch.dtype) -> torch.Tensor:
        """Causal mask ``[1, 1, q_length, kv_length]`` of the last queries, additive.

        Masks of all chunks and layers are views of one band: making each took 3 % of a prefill of 7,000 tokens.
        """
        prefix = kv_length - q_length
        band = self._band
        if band is None or band.dtype != dtype or band.shape[0] < q_length or band.shape[1] < kv_length + band.shape[0]:
            longest = max(kv_length, self.arguments["kv_length"])
            self._band = band = None  # a longer last chunk replaces it: never both in memory
            band = torch.full((q_length, longest + q_length), float("-inf"), dtype=dtype).triu_(longest + 1)
            self._band = band
        diagonal = band.shape[1] - band.shape[0]  # row i of the band is open up to column ``diagonal + i``
        start = diagonal - prefix
        return band[None, None, :q_length, start : start + kv_length]


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


def left_pads(padding: torch.Tensor | None, batch: int, tokens: int) -> NDArray[np.int64]:
    """Padding tokens on the left of each sequence. Raises UnsupportedError for any other mask."""
    if padding is None:
        return np.zeros(batch, np.int64)
    mask = padding[:, :tokens].cpu().numpy().astype(bool)
    if mask.shape != (batch, tokens) or (np.diff(mask.astype(np.int8), axis=1) < 0).any():
        raise UnsupportedError("padding that is not on the left", hint='set tokenizer.padding_side = "left"')
    if not mask.any(axis=1).all():
        raise UnsupportedError("a sequence of padding alone", hint="give every sequence at least one token")
    pads: NDArray[np.int64] = tokens - mask.sum(axis=1, dtype=np.int64)
    return pads
