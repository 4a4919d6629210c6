"""How published methods decode in another way than kvswap: parts of ``core.decode.Decode`` that they replace.

Where the query comes from: ``PreviousNorm`` and ``TrueQuery``. Who selects: ``ByHead``. What is read: ``RebuiltKeys``
reads V alone, ``Streaming`` reads everything.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.core.batch_state import BatchState
from kvswap.core.decode import Attend, Decode, Fetch
from kvswap.core.query_prediction import QueryPredictor
from kvswap.core.stored import attend_stored
from kvswap.memory.lookup import Found
from kvswap.models.adapter import LayerParts, ModelParts
from kvswap.selection.choose import top_groups
from kvswap.selection.window import Step

Int = NDArray[np.int64]
Bool = NDArray[np.bool_]


class _PreviousNormPredictor(QueryPredictor):
    def norm(self, target: LayerParts) -> Any:
        return self._parts.layers[max(0, target.index - 1)].norm


class PreviousNorm(Decode):
    """The query is predicted under the input norm of the layer before (KVSwap as published, InfiniGen)."""

    predictor = _PreviousNormPredictor


class TrueQuery(Decode):
    """The layer's own query chooses, so that its reads start when the layer attends and hide behind nothing."""

    def enter(self, part: LayerParts, hidden: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Wait for the query, unless nothing has to be chosen."""
        assert self._predictor is not None
        for target in self._predictor.targets(part):
            if target.order is not None and not self.needs_query(target.order):
                self.prefetch(target.order, None)

    def attention(self, layer: int, query: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Choose with ``query`` ``[B, H_q, 1, d]``, read, then attend."""
        if self.needs_query(layer):
            self.prefetch(layer, query[:, :, 0])
        return super().attention(layer, query, attend)


class ByHead(Decode):
    """Every KV head selects for itself and attends to nothing else; ``score`` gives ``[B, H_kv, N]``."""

    shared_selection = False

    def __init__(self, state: BatchState, parts: ModelParts | None = None) -> None:
        super().__init__(state, parts)
        self._votes: dict[int, Bool] = {}

    def choose(self, layer: int, query: torch.Tensor | None, step: Step) -> tuple[Int, Bool | None]:
        """The union of what all heads select, ``[B, n]``, and which entries are real."""
        self._votes.pop(layer, None)
        if not self.needs_query(layer):
            return super().choose(layer, query, step)
        assert query is not None
        state, first = self.state, self.state.window.sink_groups
        scores = state.method.score(state.sketches[layer], query, state.shape.scaling, state.window.group_tokens)
        groups, self._votes[layer] = groups_of_heads(scores, first, step.ends, state.select_groups[layer])
        valid = groups < step.ends[:, None]
        return groups, None if valid.all() else valid

    def mask(self, layer: int, valid: Bool | None, width: int, step: Step) -> torch.Tensor | None:
        """Which tokens each query head attends to, ``[B, H_q, 1, S]``."""
        votes = self._votes.get(layer)
        if votes is None:
            return super().mask(layer, valid, width, step)
        state, group_tokens = self.state, self.state.window.group_tokens
        groups = np.ones((state.batch, width), np.bool_) if valid is None else valid
        heads = np.repeat(groups[:, None], votes.shape[1], axis=1)
        start = int(step.sinks_valid[0].sum())
        heads[:, :, start : start + votes.shape[2]] &= votes
        tokens = np.repeat(heads, group_tokens, axis=2) & step.token_mask(valid, width, group_tokens)[:, None]
        by_query = np.repeat(tokens, state.shape.query_heads // votes.shape[1], axis=1)
        return torch.from_numpy(by_query)[:, :, None].to(state.shape.device)


class PreviousNormByHead(ByHead, PreviousNorm):
    """InfiniGen as published."""


class TrueQueryByHead(TrueQuery, ByHead):
    """Loki and Quest."""


class RebuiltKeys(TrueQueryByHead):
    """V alone is read, and the sketch gives K: ``sketch.keys(groups)``, ``[B, n]`` to ``[B, H_kv, n * G, d]``.

    Each group is read on its own, from the last aligned byte before its V.
    """

    def __init__(self, state: BatchState, parts: ModelParts | None = None) -> None:
        super().__init__(state, parts)
        layout = state.layout
        self._gap_groups = -1
        self._skip_bytes = layout.geometry.group_bytes // 2 // layout.alignment_bytes * layout.alignment_bytes

    def submit(self, found: Found) -> int:
        """Start reading the V of each group."""
        store, skip_bytes = self.state.store, self._skip_bytes
        store.settle(found.rows)
        places = found.rows, found.first, found.counts, found.addresses
        files, offsets, lengths, addresses = store.segments.locate(*places, self.state.layout.slot_bytes)
        return store.backend.submit(files, offsets + skip_bytes, lengths - skip_bytes, addresses + skip_bytes)

    def gather(self, layer: int, slots: Int, fetch: Fetch, step: Step) -> torch.Tensor:
        """K, V of slots, with the keys of selected groups from the sketch."""
        kv = super().gather(layer, slots, fetch, step)
        if fetch.groups.size:
            sketch: Any = self.state.sketches[layer]
            keys = sketch.keys(torch.from_numpy(fetch.chosen))
            start = int(step.sinks_valid[0].sum()) * self.state.window.group_tokens
            kv[0, :, :, start : start + keys.shape[2]] = keys
        return kv


class Streaming(Decode):
    """All K, V of a layer are read at each step, in large tiles; nothing is selected."""

    shared_selection = False

    def enter(self, part: LayerParts, hidden: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Nothing is read ahead."""

    def attention(self, layer: int, query: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Attention to everything that is stored: ``[B, H_q, 1, d]`` to ``[B, 1, H_q, d]``."""
        state = self.state
        rows = [
            attend_stored(state, layer, sequence, query[sequence], int(state.tokens[sequence]) + 1).result()
            for sequence in range(state.batch)
        ]
        return torch.stack(rows).to(query.dtype)


def groups_of_heads(scores: torch.Tensor, first: int, ends: Int, count: int) -> tuple[Int, Bool]:
    """The ``count`` best groups of every head within ``[first, ends[b])``.

    Parameters
    ----------
    scores
        ``[B, H_kv, N]`` float32, finite within the range.

    Returns
    -------
    The union over heads, ``[B, n]`` ascending, where surplus entries are N, at the end; and which head selected which
    of them, ``[B, H_kv, n]``.
    """
    batch, heads, groups = scores.shape
    picked = top_groups(scores.flatten(0, 1), first, np.repeat(ends, heads), count)
    marks = np.zeros((batch, heads, groups + 1), np.bool_)
    np.put_along_axis(marks, picked.cpu().numpy().reshape(batch, heads, -1), True, axis=2)
    sequences, selected = np.nonzero(marks[:, :, :groups].any(axis=1))
    counts = np.bincount(sequences, minlength=batch)
    place = np.arange(len(selected)) - (np.cumsum(counts) - counts)[sequences]
    union = np.full((batch, int(counts.max(initial=0))), groups, np.int64)
    union[sequences, place] = selected
    marks[:, :, groups] = False
    return union, np.take_along_axis(marks, union[:, None], axis=2)
