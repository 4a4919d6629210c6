"""One context in memory, decoded again and again with different selections: what tables are computed with.

K and V of the prompt stay as they are; every replay decodes the same tokens from the same place, exactly or attending
only to what a sketch selects, by the same code that selects on disk. So one prefill serves all settings, and settings
are rows of one batch: a step of one token reads all weights, which is most of its time on a small machine, and so it
reads them once for all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from kvswap.core.layer_major import LayerForward, LayerMajorCache, OffloadedLayer, Progress, offloaded_layers
from kvswap.models.adapter import LayerParts, ModelParts
from kvswap.selection.codes import LayerSketch
from kvswap.selection.mass import top_groups
from kvswap.selection.window import Window


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
    """A prompt of one sequence, and replays from its end as rows of a batch.

    ``recording``, where set, takes the queries of the first row.
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
        self.kv = self._room(1, capacity_tokens)
        self.padded_tokens = 0
        self.filled_tokens = 0
        self.recording: Recording | None = None
        self._rows: list[Selection | None] = []
        self._branched_tokens = 0
        self._tail = self.kv[..., :0, :]
        self._queries: dict[int, torch.Tensor] = {}

    @contextmanager
    def replay(self, rows: Sequence[Selection | None], steps: int) -> Iterator[None]:
        """Take up to ``steps`` tokens as a batch, each row with a selection or, None, exactly; then go back."""
        kept = {i: layer for i, layer in enumerate(self.layers) if not isinstance(layer, OffloadedLayer)}
        tokens = self._branched_tokens = self.padded_tokens
        for index, layer in kept.items():
            self.layers[index] = branch = copy.copy(layer)  # its tensors are replaced, never written to
            branch.keys, branch.values = (each.repeat(len(rows), 1, 1, 1) for each in (layer.keys, layer.values))
        self._rows, self._tail = list(rows), self._room(len(rows), steps)
        try:
            yield
        finally:
            self._rows, self._tail = [], self.kv[..., :0, :]
            self.padded_tokens = self.filled_tokens = tokens
            for index, layer in kept.items():
                self.layers[index] = layer

    def extend(self, order: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """New K, V ``[B, H_kv, n, d]`` of one layer; returns all so far, as views, of a replay those of its steps."""
        start = self.filled_tokens
        stop = self.filled_tokens = start + keys.shape[2]
        room = self.kv[order]
        if self._rows:
            room, start, stop = self._tail[order], start - self._branched_tokens, stop - self._branched_tokens
        room[0, :, :, start:stop] = keys
        room[1, :, :, start:stop] = values
        return room[0, :, :, :stop], room[1, :, :, :stop]

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
        """Exact attention of a prompt; in a replay, of each row over everything or over what it selects."""
        if not self._rows or part.order is None:
            return super().attention(part, stock, query, keys, values, mask, kwargs)
        predicted = self._queries[part.order]
        if self.recording is not None:
            self.recording.predicted[-1].append(predicted[0].float())
            self.recording.true[-1].append(query[0, :, 0].float())
        found = []
        for row, selection in enumerate(self._rows):
            one = slice(row, row + 1)
            prompt = self.kv[part.order, :, :, :, : self._branched_tokens]
            if selection is not None:
                prompt = self._selected(selection, part.order, predicted[one], prompt, keys.shape[2])
            seen_keys, seen_values = torch.cat((prompt[0], keys[one]), 2), torch.cat((prompt[1], values[one]), 2)
            found.append(super().attention(part, stock, query[one], seen_keys, seen_values, None, kwargs))
        return torch.cat(found)

    def _selected(
        self, selection: Selection, order: int, query: torch.Tensor, prompt: torch.Tensor, steps: int
    ) -> torch.Tensor:
        """What a row attends to of the prompt's K, V ``[2, 1, H_kv, T, d]``, ``steps`` tokens after it."""
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

    def _room(self, rows: int, tokens: int) -> torch.Tensor:
        parts = self.parts
        size = (len(parts.offloaded), 2, rows, parts.kv_heads, tokens, parts.head_dim)
        return torch.empty(size, dtype=parts.dtype, device=parts.device)
