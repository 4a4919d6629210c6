"""The query of a layer, predicted from the hidden state that enters the layer before it.

Called on entry to every decoder layer of a decode step, by the thread that runs the model. Follows KVSwap (arXiv
2511.11907, section 3), with the layer's own input norm in place of the previous layer's.
"""

from __future__ import annotations

from typing import Any

import torch

from kvswap.models.adapter import LayerParts, ModelParts


class QueryPredictor:
    """Predicts queries for the offloaded layers of one model."""

    def __init__(self, parts: ModelParts) -> None:
        self._parts = parts
        self._ropes: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        layers = parts.layers
        ahead = [[*layers[:1], *layers[1:2]], *([each] for each in layers[2:]), []]
        self._targets = [[part for part in each if part.order is not None] for each in ahead]

    def targets(self, part: LayerParts) -> list[LayerParts]:
        """The offloaded layers to fetch for on entry to ``part``: the next one, and the first one for itself."""
        return self._targets[part.index]

    def begin_step(self) -> None:
        """Forget the positions of the last step."""
        self._ropes.clear()

    def query(self, target: LayerParts, part: LayerParts, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """The query ``[B, H_q, d]`` of ``target``, from the input ``hidden`` ``[B, 1, E]`` of ``part``.

        ``kwargs`` are the keyword arguments with which the model calls ``part``.
        """
        cos, sin = self.rope(target, part, hidden, kwargs)
        return target.predict_query(hidden, cos, sin, self.norm(target))

    def rope(
        self, target: LayerParts, part: LayerParts, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin ``[B or 1, 1, d]`` of ``target``, from the arguments with which the model calls ``part``."""
        if target.layer_type == part.layer_type:
            cos, sin = kwargs["position_embeddings"]
            return cos, sin
        return self._rope_of(target.layer_type, hidden, kwargs["position_ids"])  # RoPE differs by layer type (Gemma 3)

    def norm(self, target: LayerParts) -> Any:
        """The input norm to use for ``target``: its own."""
        return target.norm

    def _rope_of(
        self, layer_type: str, hidden: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_type not in self._ropes:
            self._ropes[layer_type] = self._parts.rotary(hidden, position_ids, layer_type)
        return self._ropes[layer_type]
