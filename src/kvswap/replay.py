"""One context in memory, decoded again and again with different selections: what tables are computed with.

K and V of the prompt stay as they are; every replay decodes the same tokens from the same place, exactly or attending
only to what a sketch selects, by the same code that selects on disk. So one prefill serves all settings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kvswap.layer_major import HeldLayer, LayerForward, LayerMajorCache, Progress, held_layers
from kvswap.models.adapter import LayerParts, ModelParts
from kvswap.predict.mass import top_groups
from kvswap.sketch.codes import LayerSketch
from kvswap.window import Window


@dataclass(slots=True)
class Selection:
    """Select ``groups[layer]`` groups of a layer by its sketch, which holds the whole groups of the context."""

    window: Window
    groups: list[int]
    sketches: list[LayerSketch]


@dataclass(slots=True)
class Recording:
    """Queries of exact steps by layer: as predicted one layer ahead, and as they were. Each ``[H_q, d]`` float32."""

    predicted: list[list[torch.Tensor]] = field(default_factory=list)
    true: list[list[torch.Tensor]] = field(default_factory=list)


class ReplayCache(LayerMajorCache):
    """One sequence. ``selection`` None decodes exactly; ``recording``, where set, takes the queries."""

    def __init__(
        self,
        parts: ModelParts,
        implementation: str,
        *,
        capacity_tokens: int,
        chunk_tokens: int,
        on_progress: Progress | None = None,
    ) -> None:
        layers = held_layers(parts, self)
        super().__init__(parts, implementation, layers, chunk_tokens=chunk_tokens, on_progress=on_progress)
        size = (len(parts.offloaded), 2, 1, parts.kv_heads, capacity_tokens, parts.head_dim)
        self.kv = torch.empty(size, dtype=parts.dtype, device=parts.device)
        self.padded_tokens = 0
        self.filled_tokens = 0
        self.selection: Selection | None = None
        self.recording: Recording | None = None
        self._queries: dict[int, torch.Tensor] = {}

    def mark(self) -> Callable[[], None]:
        """Remember this place; the result goes back to it."""
        tokens = self.padded_tokens
        kept = {i: copy.deepcopy(layer) for i, layer in enumerate(self.layers) if not isinstance(layer, HeldLayer)}

        def back() -> None:
            self.padded_tokens = self.filled_tokens = tokens
            for index, layer in kept.items():
                self.layers[index] = copy.deepcopy(layer)

        return back

    def take(self, order: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """New K, V ``[1, H_kv, n, d]`` of one layer; returns all so far, as views."""
        stop = self.filled_tokens + keys.shape[2]
        self.kv[order, 0, :, :, self.filled_tokens : stop] = keys
        self.kv[order, 1, :, :, self.filled_tokens : stop] = values
        self.filled_tokens = stop
        return self.kv[order, 0, :, :, :stop], self.kv[order, 1, :, :, :stop]

    def mask_tokens(self, query_length: int) -> int:
        """K of the running layer so far, and the chunk's."""
        return self.filled_tokens + query_length

    def leave(self, part: LayerParts) -> None:
        """The next layer begins where this one began."""
        self.filled_tokens = self.padded_tokens

    def end(self, tokens: int) -> None:
        """Count the tokens of this forward."""
        super().end(tokens)
        self.padded_tokens += tokens
        self.filled_tokens = self.padded_tokens
        self._queries.clear()

    def decode_layer(
        self, part: LayerParts, forward: LayerForward, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> Any:
        """Predict the query of the next layer, as on disk, then run this one."""
        if self.recording is not None and part.index == 0:
            self.recording.predicted.append([])
            self.recording.true.append([])
        targets = self.parts.layers[part.index + (part.index > 0) : part.index + 2]
        for target in targets:
            if target.order is not None:
                cos, sin = kwargs["position_embeddings"]
                if target.layer_type != part.layer_type:
                    cos, sin = self.parts.position_embeddings(hidden, kwargs["position_ids"], target.layer_type)
                self._queries[target.order] = target.predict_query(hidden, cos, sin)
        output = super().decode_layer(part, forward, hidden, kwargs)
        self.filled_tokens = self.padded_tokens
        return output

    def attention(
        self,
        part: LayerParts,
        stock: Callable[..., Any],
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Exact attention, or attention over what is selected."""
        if query.shape[2] == 1 and self._queries:
            assert part.order is not None
            predicted = self._queries[part.order]
            if self.recording is not None:
                self.recording.predicted[-1].append(predicted[0].float())
                self.recording.true[-1].append(query[0, :, 0].float())
            if self.selection is not None:
                keys, values = self._selected(part.order, predicted, keys, values)
            mask = None
        return super().attention(part, stock, query, keys, values, mask, kwargs)

    def _selected(
        self, order: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.selection is not None
        window, tokens = self.selection.window, keys.shape[2]
        start = window.ring_start((tokens - 1) // window.group_tokens)
        sketch = self.selection.sketches[order]
        scores = sketch.group_mass(query, self.parts.scaling, window.group_tokens)
        count = min(self.selection.groups[order], start - window.sink_groups)
        picked = top_groups(scores, window.sink_groups, [start], count)[0]
        groups = torch.cat((torch.arange(window.sink_groups, device=picked.device), picked))
        inside = (
            groups[:, None] * window.group_tokens + torch.arange(window.group_tokens, device=picked.device)
        ).flatten()
        places = torch.cat((inside, torch.arange(start * window.group_tokens, tokens, device=picked.device)))
        return keys[:, :, places], values[:, :, places]
