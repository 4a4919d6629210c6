"""Measure the quality of selection during a run: repeat some steps with exact attention and compare.

``generate`` calls ``QualityMeter`` as a logits processor, with the logits of every step. For a check, the step's token
goes through the model once more, and every offloaded layer attends to all of its K, V, which stream from disk in tiles.
Logits pass through unchanged, and the cache stays as it is. Hidden states of earlier steps are those of the run, so a
check measures the effect of selection in this one step.

The tiles (about 2,000 tokens of one layer) take memory outside the limit. One thread: the one that runs the model.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from kvswap.app.stats import QualityStats
from kvswap.core.attention import TiledAttention
from kvswap.core.cache import KVSwapCache
from kvswap.core.layer_major import AttentionInput, LayerMajorCache, OffloadedLayer
from kvswap.core.stored import stored_tiles
from kvswap.errors import UnsupportedError
from kvswap.models.adapter import cache_keyword

COST_SHARE = 0.05
"""Checks may take this share of the decode time."""


class QualityMeter:
    """Checks the first step, then as many as ``COST_SHARE`` allows. For caches of one sequence.

    Raises UnsupportedError for methods that select by head, stream, or rebuild keys.
    """

    def __init__(self, model: Any, cache: KVSwapCache) -> None:
        if not cache.shared_selection:
            raise UnsupportedError(f"checking the quality of method {cache.method.name}", hint="use method kvswap")
        self._model, self._cache = model, cache
        self._checks: list[tuple[float, float, bool]] = []
        self._check_s = self._decode_s = 0.0
        self._last_s: float | None = None
        self._sliding: dict[int, Any] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Check the last step if it is time to. Takes the logits ``[1, V]`` after ``input_ids`` ``[1, T]``.

        Returns the logits unchanged.
        """
        now_s = time.perf_counter()
        if self._last_s is not None:
            self._decode_s += now_s - self._last_s
            each_s = self._check_s / len(self._checks) if self._checks else 0.0
            if self._check_s + each_s <= COST_SHARE * self._decode_s or not self._checks:
                self.check(int(input_ids[0, -1]), scores[0])
        self.remember()
        self._last_s = time.perf_counter()
        return scores

    def remember(self) -> None:
        """Remember the state of sliding-window layers before a step that may be checked. Tensors are not copied."""
        layers = enumerate(self._cache.layers)
        self._sliding = {index: copy.copy(layer) for index, layer in layers if layer.is_sliding}

    def mass(self, token: int) -> float:
        """Return the share of attention mass that the last step kept, as the mean over heads and layers.

        ``token`` is the token of that step.
        """
        return self._exact(token)[1]

    def check(self, token: int, logits: torch.Tensor) -> tuple[float, float]:
        """Repeat the last step, of ``token``, exactly; ``logits`` ``[V]`` are its result in the run.

        Returns
        -------
        The share of attention mass that the selection kept, as the mean over heads and layers, and KL(exact ||
        selected) in nats.
        """
        start_s = time.perf_counter()
        exact, kept = self._exact(token)
        found = logits.float().log_softmax(-1)
        kl = float(functional.kl_div(found, exact, log_target=True, reduction="sum"))
        self._checks.append((kept, kl, bool(found.argmax() == exact.argmax())))
        self._check_s += time.perf_counter() - start_s
        return kept, kl

    @torch.no_grad()
    def _exact(self, token: int) -> tuple[torch.Tensor, float]:
        """Log-probabilities ``[V]`` of the last step with exact attention, and the mass that the selection kept."""
        view = _ExactView(self._cache, self._sliding)
        tokens = torch.tensor([[token]], device=self._model.device)
        output = self._model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{cache_keyword(self._model): view})
        return output.logits[0, -1].float().log_softmax(-1), float(np.mean(view.kept))

    @property
    def stats(self) -> QualityStats | None:
        """Means over the checked steps; None before the first check."""
        if not self._checks:
            return None
        kept, kl, same = (float(np.mean(values)) for values in zip(*self._checks, strict=True))
        return QualityStats(
            checks=len(self._checks),
            mass_kept=kept,
            mass_kept_least=min(each[0] for each in self._checks),
            kl=kl,
            same=same,
            check_s=self._check_s,
        )


class _ExactView(LayerMajorCache):
    """The context of a cache without its last token, with exact attention, for one forward of that token."""

    def __init__(self, cache: KVSwapCache, sliding: dict[int, Any]) -> None:
        assert cache.decode is not None
        self._decode, self._state = cache.decode, cache.decode.state
        self.padded_tokens = int(self._state.tokens[0]) - 1
        self.kept: list[float] = []
        layers = [sliding.get(part.index) or OffloadedLayer(self, part.index) for part in cache.parts.layers]
        super().__init__(cache.parts, cache.implementation, layers, chunk_tokens=cache.chunk_tokens, on_progress=None)

    def extend(self, order: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The new token's K, V as they are; nothing is stored."""
        return keys, values

    def mask_tokens(self, query_length: int) -> int:
        """Length of K in a mask."""
        return self.padded_tokens + query_length

    def attention(self, given: AttentionInput) -> torch.Tensor:
        """Compute exact attention of one token, and record how much of its mass the selection had attended to."""
        order, query = given.part.order, given.query
        assert order is not None
        state, attended = self._state, torch.from_numpy(self._attended(order))
        shape = state.shape
        whole, chosen = (TiledAttention(query[0], shape.kv_heads, shape.scaling, given.softcap) for _ in range(2))
        for start, tile_keys, tile_values in stored_tiles(state, order, 0, self.padded_tokens):
            whole.add(tile_keys, tile_values)
            inside = attended[start : start + tile_keys.shape[1]].to(tile_keys.device)
            if bool(inside.any()):
                chosen.add(tile_keys[:, inside], tile_values[:, inside])
        for each in (whole, chosen):
            each.add(given.keys[0], given.values[0])
        self.kept.append(float((chosen.log_total - whole.log_total).exp().mean()))
        return whole.result(given.sink_logits)[None].to(query.dtype)

    def _attended(self, order: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which tokens before the last one the last step attended to: bool ``[T - 1]``."""
        window, (chosen, real) = self._state.window, self._decode.chosen(order)
        current = self.padded_tokens // window.group_tokens
        groups = np.zeros(current + 1, bool)
        groups[: window.sink_groups] = True
        groups[window.ring_start(current) :] = True
        groups[chosen if real is None else chosen[real]] = True
        return np.repeat(groups, window.group_tokens)[: self.padded_tokens]
