"""Decode steps of several caches in one forward: each cache is one row of the batch and takes its own token.

A decode step reads all weights, which takes most of its time on a small machine. A batch reads them once for all
caches. Each cache selects, reads and attends as it does alone, so results differ by rounding only. Use this to compare
predictions and answers; ``teacher_forcing`` measures times. One thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from kvswap.core.layer_major import AttentionInput, LayerForward, LayerMajorCache, OffloadedLayer
from kvswap.lab.evals.teacher_forcing import ForcedRun, compare
from kvswap.models.adapter import LayerParts, cache_keyword

Pair = tuple[torch.Tensor, torch.Tensor]
Key = TypeVar("Key")


class CacheBatch(LayerMajorCache):
    """Several caches as one cache of a batch, for steps of one token.

    Each of ``caches`` holds one sequence, and all sequences have the same length.
    """

    def __init__(self, caches: Sequence[LayerMajorCache]) -> None:
        first = self._first = caches[0]
        self._caches = list(caches)
        layers = [_BatchLayer(self, part.index, first.layers[part.index]) for part in first.parts.layers]
        super().__init__(first.parts, first.implementation, layers, chunk_tokens=first.chunk_tokens, on_progress=None)
        self._pairs: list[Pair] = []  # what each cache's ``update`` returned in the running layer

    @property
    def padded_tokens(self) -> int:
        """Length of each sequence in tokens."""
        return int(self._first.get_seq_length())

    def run_layer(self, part: LayerParts, forward: LayerForward, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        """Run one layer on ``hidden`` ``[B, 1, E]``, nested in what every cache does before and after a layer."""
        if hidden.shape[1] != 1:
            raise ValueError(f"{hidden.shape[1]} tokens at once: a batch of caches takes steps of one token")

        def within(row: int) -> Any:
            if row == len(self._caches):
                # No mask is needed: there is one query and no padding.
                return forward(hidden, **{**kwargs, "attention_mask": None})
            own = hidden[row : row + 1]
            return self._caches[row].run_layer(part, lambda *_, **__: within(row + 1), own, kwargs)

        return within(0)

    def extend(self, order: int, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        """Give every cache its row of the new K, V ``[B, H_kv, 1, d]`` of layer ``order``."""
        rows = zip(self._caches, keys.split(1), values.split(1), strict=True)
        self._pairs = [cache.layers[order].update(*pair) for cache, *pair in rows]
        if not self._first.layers[order].is_sliding:
            return keys, values
        keys, values = (torch.cat(tensors) for tensors in zip(*self._pairs, strict=True))
        return keys, values  # sliding-window layers use the model's own attention

    def attention(self, given: AttentionInput) -> torch.Tensor:
        """Let every cache attend for its row: ``query`` ``[B, H_q, 1, d]`` to output ``[B, 1, H_q, d]``."""
        rows = zip(self._caches, given.query.split(1), self._pairs, strict=True)
        own = [(cache, replace(given, query=query, keys=keys, values=values)) for cache, query, (keys, values) in rows]
        return torch.cat([cache.attention(row) for cache, row in own])

    def mask_tokens(self, query_length: int) -> int:
        """Length of K, which a mask must have."""
        return self.padded_tokens + query_length


class _BatchLayer(OffloadedLayer):
    """One layer of all caches; ``first`` is the layer of the first cache."""

    def __init__(self, batch: CacheBatch, index: int, first: Any) -> None:
        super().__init__(batch, index)
        self.is_sliding, self._first = first.is_sliding, first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of K, which a mask must have."""
        sizes: tuple[int, int] = self._first.get_mask_sizes(query_length)
        return sizes


def force_batched(
    model: Any,
    caches: Mapping[Key, Any],
    ids: Sequence[int],
    row: torch.Tensor,
    *,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[Key, ForcedRun]:
    """Feed ``ids`` one by one to caches that hold the same prompt, as one batch.

    ``row`` are the log-probabilities ``[V]`` after the prompt. The first cache is the reference. ``on_step`` is called
    with (steps done, steps in all). No times are measured.
    """
    runs = {name: ForcedRun(first_nll=-float(row[ids[0]]), expected=[int(row.argmax()) == ids[0]]) for name in caches}
    batch = CacheBatch(list(caches.values()))
    for number, token in enumerate(ids):
        rows = _step(model, batch, [token] * len(runs))
        compare(runs, dict(zip(runs, rows, strict=True)), ids[number + 1] if number + 1 < len(ids) else None)
        if on_step is not None:
            on_step(number + 1, len(ids))
    return runs


def greedy_batched(
    model: Any,
    caches: Sequence[Any],
    row: torch.Tensor,
    count: int,
    *,
    stops: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Decode greedily up to ``count`` tokens with each cache, as one batch.

    All caches hold the same prompt; ``row`` are the log-probabilities ``[V]`` after it. A sequence ends with the token
    after which ``stops(tokens so far)`` is true.
    """
    found: list[list[int]] = [[] for _ in caches]
    going, rows = list(range(len(caches))), row.expand(len(caches), -1)
    for _ in range(count):
        for number, each in zip(going, rows, strict=True):
            found[number].append(int(each.argmax()))
        kept = [number for number in going if not stops(found[number])]
        if not kept or len(found[kept[0]]) == count:
            break
        going = kept
        rows = _step(model, CacheBatch([caches[number] for number in going]), [found[number][-1] for number in going])
    return found


@torch.no_grad()
def _step(model: Any, batch: CacheBatch, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities after one token for each cache, float32 ``[B, V]``."""
    ids = torch.tensor(tokens, device=model.device)[:, None]
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_keyword(model): batch})
    return output.logits[:, -1].float().cpu().log_softmax(-1)  # type: ignore[no-any-return]
