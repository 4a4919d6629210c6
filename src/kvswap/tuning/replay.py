"""A cache that decodes the same tokens repeatedly after one prompt, each time with other selections of groups.

``measure_tables`` uses it. K and V of the prompt stay in memory unchanged. A *replay* decodes from the end of the
prompt, with exact attention or with attention to the groups that a sketch selects. Selection uses the same code as the
cache on disk. One prefill therefore serves all settings.

The settings of a replay are rows of one batch. A decode step reads all weights, which takes most of its time on a small
machine; a batch reads them once for all settings. One thread.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvswap.core.layer_major import (
    AttentionInput,
    LayerForward,
    LayerMajorCache,
    OffloadedLayer,
    Progress,
    offloaded_layers,
)
from kvswap.models.adapter import LayerParts, ModelParts
from kvswap.selection.choose import top_groups
from kvswap.selection.sketch import LayerSketch
from kvswap.selection.window import Window


@dataclass(slots=True)
class Selection:
    """Which groups a row attends to: the best ``groups[layer]`` of each layer by the scores of ``sketches[layer]``.

    The sketches hold the complete groups of the prompt.
    """

    window: Window
    groups: list[int]
    sketches: list[LayerSketch]


@dataclass(slots=True)
class Recording:
    """Queries by step and offloaded layer, each float32 ``[H_q, d]``: predicted one layer ahead, and true."""

    predicted: list[list[torch.Tensor]] = field(default_factory=list)
    true: list[list[torch.Tensor]] = field(default_factory=list)


class ReplayCache(LayerMajorCache):
    """The prompt of one sequence, and replays from its end whose settings are rows of a batch.

    While ``recording`` is set, the queries of the first row are appended to it.
    """

    def __init__(
        self,
        parts: ModelParts,
        implementation: str,
        *,
        capacity_tokens: int,
        chunk_tokens: int,
        on_progress: Progress | None = None,
    ) -> None:
        layers = offloaded_layers(parts, self)
        super().__init__(parts, implementation, layers, chunk_tokens=chunk_tokens, on_progress=on_progress)
        self.kv = self._allocate(1, capacity_tokens)
        self.padded_tokens = 0
        self.filled_tokens = 0
        self.recording: Recording | None = None
        self._rows: list[Selection | None] = []
        self._branched_tokens = 0
        self._tail = self.kv[..., :0, :]
        self._queries: dict[int, torch.Tensor] = {}

    @contextmanager
    def replay(self, rows: Sequence[Selection | None], steps: int) -> Iterator[None]:
        """Decode up to ``steps`` tokens inside the block, then return to the end of the prompt.

        Each entry of ``rows`` is one row of the batch: a selection, or None for exact attention.
        """
        kept = {i: layer for i, layer in enumerate(self.layers) if not isinstance(layer, OffloadedLayer)}
        tokens = self._branched_tokens = self.padded_tokens
        for index, layer in kept.items():
            self.layers[index] = branch = copy.copy(layer)  # a shallow copy: its tensors are replaced, not written to
            branch.keys, branch.values = (each.repeat(len(rows), 1, 1, 1) for each in (layer.keys, layer.values))
        self._rows, self._tail = list(rows), self._allocate(len(rows), steps)
        try:
            yield
        finally:
            self._rows, self._tail = [], self.kv[..., :0, :]
            self.padded_tokens = self.filled_tokens = tokens
            for index, layer in kept.items():
                self.layers[index] = layer

    def extend(self, order: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new K, V ``[B, H_kv, n, d]`` of one layer.

        Returns views of the layer's K, V so far; during a replay, those of its own steps alone.
        """
        start = self.filled_tokens
        stop = self.filled_tokens = start + keys.shape[2]
        memory = self.kv[order]
        if self._rows:
            memory, start, stop = self._tail[order], start - self._branched_tokens, stop - self._branched_tokens
        memory[0, :, :, start:stop] = keys
        memory[1, :, :, start:stop] = values
        return memory[0, :, :, :stop], memory[1, :, :, :stop]

    def mask_tokens(self, query_length: int) -> int:
        """Length of the running layer's K after this chunk."""
        return self.filled_tokens + query_length

    def leave(self, part: LayerParts) -> None:
        """Reset the position, because the next layer begins where this one began."""
        self.filled_tokens = self.padded_tokens

    def end(self, tokens: int) -> None:
        """Add the tokens of this forward to the length of the context."""
        super().end(tokens)
        self.padded_tokens += tokens
        self.filled_tokens = self.padded_tokens
        self._queries.clear()

    def decode_layer(
        self, part: LayerParts, forward: LayerForward, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> Any:
        """Predict the query of the next layer as the cache on disk does, then run this layer."""
        if self.recording is not None and part.index == 0:
            self.recording.predicted.append([])
            self.recording.true.append([])
        targets = self.parts.layers[part.index + (part.index > 0) : part.index + 2]
        for target in targets:
            if target.order is not None:
                cos, sin = kwargs["position_embeddings"]
                if target.layer_type != part.layer_type:
                    cos, sin = self.parts.rotary(hidden, kwargs["position_ids"], target.layer_type)
                self._queries[target.order] = target.predict_query(hidden, cos, sin)
        output = super().decode_layer(part, forward, hidden, kwargs)
        self.filled_tokens = self.padded_tokens
        return output

    def attention(self, given: AttentionInput) -> torch.Tensor:
        """Compute exact attention for a prompt; in a replay, attend to everything or to a row's selection."""
        order, query, keys, values = given.part.order, given.query, given.keys, given.values
        if not self._rows or order is None:
            return super().attention(given)
        predicted = self._queries[order]
        if self.recording is not None:
            self.recording.predicted[-1].append(predicted[0].float())
            self.recording.true[-1].append(query[0, :, 0].float())
        found = []
        for row, selection in enumerate(self._rows):
            one = slice(row, row + 1)
            prompt = self.kv[order, :, :, :, : self._branched_tokens]
            if selection is not None:
                prompt = self._selected(selection, order, predicted[one], prompt, keys.shape[2])
            seen_keys, seen_values = torch.cat((prompt[0], keys[one]), 2), torch.cat((prompt[1], values[one]), 2)
            seen = replace(given, query=query[one], keys=seen_keys, values=seen_values, mask=None)
            found.append(super().attention(seen))
        return torch.cat(found)

    def _selected(
        self, selection: Selection, order: int, query: torch.Tensor, prompt: torch.Tensor, steps: int
    ) -> torch.Tensor:
        """Gather what a row attends to from the prompt's K, V ``[2, 1, H_kv, T, d]``, ``steps`` tokens after it."""
        window, tokens = selection.window, prompt.shape[3]
        start = window.ring_start((tokens + steps - 1) // window.group_tokens)
        scores = selection.sketches[order].group_mass(query, self.parts.scaling, window.group_tokens)
        count = min(selection.groups[order], start - window.sink_groups)
        picked = top_groups(scores, window.sink_groups, [start], count)[0]
        groups = torch.cat((torch.arange(window.sink_groups, device=picked.device), picked))
        inside = (
            groups[:, None] * window.group_tokens + torch.arange(window.group_tokens, device=picked.device)
        ).flatten()
        places = torch.cat((inside, torch.arange(start * window.group_tokens, tokens, device=picked.device)))
        return prompt[:, :, :, places]

    def _allocate(self, rows: int, tokens: int) -> torch.Tensor:
        """Uninitialised K, V of all offloaded layers: ``[L, 2, rows, H_kv, tokens, d]`` in the compute dtype."""
        parts = self.parts
        size = (len(parts.offloaded), 2, rows, parts.kv_heads, tokens, parts.head_dim)
        return torch.empty(size, dtype=parts.dtype, device=parts.device)
