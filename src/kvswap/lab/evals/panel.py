"""Steps of several caches in one forward: every cache is a row of the batch, with a token of its own.

A step of one token reads all weights, which on a small machine is most of its time; a panel reads them once for all
caches. Each cache predicts, reads and attends as it does alone, so what differs is rounding. For comparing answers, not
times: those are taken in turns (``kvswap.lab.evals.forced``). One thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from kvswap.core.layer_major import LayerForward, LayerMajorCache, OffloadedLayer
from kvswap.lab.evals.forced import ForcedRun, judge
from kvswap.models.adapter import LayerParts, cache_keyword

Pair = tuple[torch.Tensor, torch.Tensor]
Key = TypeVar("Key")


class Panel(LayerMajorCache):
    """Caches of one sequence each and of the same length, as one cache of a batch, for steps of one token."""

    def __init__(self, caches: Sequence[LayerMajorCache]) -> None:
        first = self._first = caches[0]
        self._caches = list(caches)
        layers = [_PanelLayer(self, part.index, first.layers[part.index]) for part in first.parts.layers]
        super().__init__(first.parts, first.implementation, layers, chunk_tokens=first.chunk_tokens, on_progress=None)
        self._pairs: list[Pair] = []  # K, V that each cache gave back for its newest token in this layer

    @property
    def padded_tokens(self) -> int:
        """Tokens seen, by each."""
        return int(self._first.get_seq_length())

    def run_layer(self, part: LayerParts, forward: LayerForward, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        """Run one layer once, ``hidden`` ``[B, 1, E]``, within what every cache does before and after it."""
        assert hidden.shape[1] == 1, "a panel takes steps of one token"

        def within(row: int) -> Any:
            if row == len(self._caches):
                return forward(hidden, **{**kwargs, "attention_mask": None})  # one query, no padding: sees everything
            own = hidden[row : row + 1]
            return self._caches[row].run_layer(part, lambda *_, **__: within(row + 1), own, kwargs)

        return within(0)

    def extend(self, order: int, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        """Give every cache its row of new K, V ``[B, H_kv, 1, d]`` of the layer of index ``order``."""
        rows = zip(self._caches, keys.split(1), values.split(1), strict=True)
        self._pairs = [cache.layers[order].update(*pair) for cache, *pair in rows]
        if not self._first.layers[order].is_sliding:
            return keys, values
        keys, values = (torch.cat(tensors) for tensors in zip(*self._pairs, strict=True))
        return keys, values  # the model attends to a window by itself

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
        """Every cache's own attention to what it holds: ``[B, H_q, 1, d]`` to ``[B, 1, H_q, d]``."""
        rows = zip(self._caches, query.split(1), self._pairs, strict=True)
        return torch.cat([cache.attention(part, stock, own, *pair, mask, kwargs) for cache, own, pair in rows])

    def mask_tokens(self, query_length: int) -> int:
        """Length of K in a mask."""
        return self.padded_tokens + query_length


class _PanelLayer(OffloadedLayer):
    """One layer of all caches; ``first`` is that of the first."""

    def __init__(self, panel: Panel, index: int, first: Any) -> None:
        super().__init__(panel, index)
        self.is_sliding, self._first = first.is_sliding, first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of K in a mask."""
        sizes: tuple[int, int] = self._first.get_mask_sizes(query_length)
        return sizes


def force_together(
    model: Any,
    caches: Mapping[Key, Any],
    ids: Sequence[int],
    row: torch.Tensor,
    *,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[Key, ForcedRun]:
    """Feed ``ids`` one by one to caches that hold the same prompt, after which it goes on as ``row`` ``[V]`` tells.

    The first cache is the reference. ``on_step`` is called with ``(steps done, steps in all)``. No times are taken.
    """
    runs = {name: ForcedRun(first_nll=-float(row[ids[0]]), expected=[int(row.argmax()) == ids[0]]) for name in caches}
    panel = Panel(list(caches.values()))
    for number, token in enumerate(ids):
        rows = _step(model, panel, [token] * len(runs))
        judge(runs, dict(zip(runs, rows, strict=True)), ids[number + 1] if number + 1 < len(ids) else None)
        if on_step is not None:
            on_step(number + 1, len(ids))
    return runs


def greedy_together(
    model: Any,
    caches: Sequence[Any],
    row: torch.Tensor,
    count: int,
    *,
    stops: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Up to ``count`` likeliest tokens from each cache, all of which hold the same prompt, after which comes ``row``.

    ``stops(found)`` is asked after every token; the token that it says yes to is the last.
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
        rows = _step(model, Panel([caches[number] for number in going]), [found[number][-1] for number in going])
    return found


@torch.no_grad()
def _step(model: Any, panel: Panel, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities ``[B, V]`` float32 after a token for each cache."""
    ids = torch.tensor(tokens, device=model.device)[:, None]
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_keyword(model): panel})
    return output.logits[:, -1].float().cpu().log_softmax(-1)  # type: ignore[no-any-return]
