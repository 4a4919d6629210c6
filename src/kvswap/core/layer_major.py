"""Prompts go through a model one layer at a time, in chunks: what every cache of kvswap does.

The wrapper round each decoder layer (``model_patch.py``) calls ``LayerMajorCache``. ``FullCache`` keeps K, V in memory
with the same chunked prefill, for comparison. One thread, the one that runs the model.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin, DynamicLayer

from kvswap.config import Config
from kvswap.core.attention import chunk_attention
from kvswap.core.cache_stats import CacheStats, Trace
from kvswap.core.prefill import chunk_spans, run_layer
from kvswap.core.window_layer import WindowLayer
from kvswap.errors import UnsupportedError
from kvswap.models.adapter import LayerParts, ModelParts
from kvswap.models.masks import DeferredMask, resolve
from kvswap.weights.modules import prompt_products

Progress = Callable[[str, int, int], None]
LayerForward = Callable[..., torch.Tensor]
_PATIENCE_S = 1.0


@dataclass(frozen=True, slots=True)
class AttentionInput:
    """What a decoder layer hands to its attention.

    ``query`` ``[B, H_q, q, d]``, ``keys`` and ``values`` ``[B, H_kv, S, d]``. ``stock`` is the model's own attention
    function; ``mask`` and ``arguments`` are as that function takes them.
    """

    part: LayerParts
    stock: Callable[..., Any]
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    mask: Any
    arguments: dict[str, Any]

    @property
    def special(self) -> bool:
        """Whether attention is more than softmax(QK)V here, so that only the model's own function can do it."""
        return any(self.arguments.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))

    @property
    def softcap(self) -> float:
        """What logits are held within (Gemma 2); 0: nothing."""
        return float(self.arguments.get("softcap") or 0.0)

    @property
    def sink_logits(self) -> torch.Tensor | None:
        """Logits ``[H_q]`` that take a share of the attention and add nothing (gpt-oss)."""
        found: torch.Tensor | None = self.arguments.get("s_aux")
        return found

    def stock_output(self) -> torch.Tensor:
        """What the model's own function gives, ``[B, q, H_q, d]``."""
        module, mask = self.part.attention, self.mask
        output: torch.Tensor = self.stock(module, self.query, self.keys, self.values, mask, **self.arguments)[0]
        return output


class LayerMajorCache(Cache):
    """A cache whose prompts go through the model layer by layer, in chunks of ``chunk_tokens``."""

    is_compileable = False

    def __init__(
        self,
        parts: ModelParts,
        implementation: str,
        layers: list[Any],
        *,
        chunk_tokens: int,
        on_progress: Progress | None,
    ) -> None:
        super().__init__(layers=layers)
        self.parts, self.implementation, self.chunk_tokens = parts, implementation, chunk_tokens
        self.trace = Trace()
        self.answer_tokens = 0
        """Longest answer to follow the next forward, where the caller knows: that is refused if the two do not fit."""
        self.keeps_unpacked = True  # packed weights of a layer for all chunks of a prompt, where memory allows
        self._on_progress = on_progress
        self._started_s = 0.0
        self._running = False
        self._stored = 0  # padded tokens stored before the running forward
        self._turn = threading.RLock()  # held while a layer runs; a failed commit after a prompt stops its own forward
        self._runner: threading.Thread | None = None  # is between two layers of a forward, or within one
        self._stopped = False
        self._prompting = False  # what runs is a prompt, also where it has a single token
        self._decoding = False  # the running forward is a decode step

    @contextmanager
    def prompt(self) -> Iterator[None]:
        """Within the block every forward is (part of) a prompt, which is exact, also one of a single token.

        ``generate`` enters it for its prompt. Elsewhere a single token behind stored ones is a decode step.
        """
        before, self._prompting = self._prompting, True
        try:
            yield
        finally:
            self._prompting = before

    # ---- one layer of a forward, called by the wrapper round each decoder layer

    def call_layer(self, part: LayerParts, forward: LayerForward, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        """``run_layer`` for the wrapper round a decoder layer: never at once with ``stop``, which ends the forward."""
        if torch.is_inference_mode_enabled():
            with ordinary_tensors():
                return self.call_layer(part, forward, hidden, kwargs)
        with self._turn:
            try:
                self._check_running()
                self._runner = threading.current_thread()
                output = self.run_layer(part, forward, hidden, kwargs)
            except BaseException:
                self._runner = None
                raise
            if part.index == len(self.parts.layers) - 1:
                self._runner = None
            return output

    def stop(self) -> None:
        """Have no layer run any more, so that memory and the model's patches can go. Waits for the running layer.

        A forward of another thread gets UnsupportedError at its next layer.
        """
        with self._turn:
            self._stopped = True
        runner, end_s = self._runner, time.monotonic() + _PATIENCE_S
        while runner is not None and runner is not threading.current_thread() and runner.is_alive():
            if self._runner is not runner or time.monotonic() > end_s:  # it may have broken off between two layers
                return
            time.sleep(0.001)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Take new K, V of a layer; see ``Cache``. Raises UnsupportedError after the end of the attach block."""
        self._check_running()
        return super().update(*args, **kwargs)

    def _check_running(self) -> None:
        if self._stopped:
            raise UnsupportedError(
                "the attach block of this cache has been left", hint="call the model within the block, to its end"
            )

    def run_layer(self, part: LayerParts, forward: LayerForward, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        """Run one decoder layer on ``hidden`` ``[B, T, E]`` with the keyword arguments the model gave."""
        mask = kwargs.get("attention_mask")
        if part.index == 0:
            if self._running:
                raise UnsupportedError(
                    "the last forward broke off, so layers hold different numbers of tokens",
                    hint="leave the attach block and enter a new one",
                )
            self._stored = self.get_seq_length()
            self._decoding = hidden.shape[1] == 1 and self._stored > 0 and not self._prompting
            self.begin(hidden, self._check_call(mask, kwargs))
            self._running = True
        if self._decoding:
            output = self.decode_layer(part, forward, hidden, kwargs)
        else:
            output = self._prefill_layer(part, forward, hidden, kwargs)
        if part.index == len(self.parts.layers) - 1:
            self.end(hidden.shape[1])
            self._running = False
        return output

    def begin(self, hidden: torch.Tensor, mask: DeferredMask) -> None:
        """A forward begins."""
        self._started_s = time.perf_counter()

    def end(self, tokens: int) -> None:
        """A forward is through all layers."""
        if not self._decoding:
            self.trace.prefill_s += time.perf_counter() - self._started_s

    def leave(self, part: LayerParts) -> None:
        """A prompt is through one layer."""

    def decode_layer(
        self, part: LayerParts, forward: LayerForward, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> Any:
        """Run one layer for a single new token."""
        kwargs = {**kwargs, "attention_mask": resolve(kwargs.get("attention_mask"), self.implementation)}
        return forward(hidden, **kwargs)

    def attention(self, given: AttentionInput) -> torch.Tensor:
        """Attention of one offloaded layer: ``[B, H_q, q, d]`` to ``[B, q, H_q, d]``."""
        if self.implementation == "sdpa" and given.query.shape[2] > 1 and not given.special:
            return chunk_attention(given.query, given.keys, given.values, given.mask, self.parts.scaling)
        return given.stock_output()

    def attention_in_memory(self, given: AttentionInput) -> torch.Tensor:
        """Attention of a layer that stays in memory, shaped alike."""
        return given.stock_output()

    def _prefill_layer(
        self, part: LayerParts, forward: LayerForward, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> Any:
        tokens = hidden.shape[1]
        chunks = len(list(chunk_spans(tokens, self.chunk_tokens)))
        done = 0

        def chunk(piece: torch.Tensor, start: int, stop: int) -> torch.Tensor:
            nonlocal done
            output = forward(piece, **self._chunk_kwargs(part, kwargs, start, stop))
            done += 1
            if self._on_progress is not None:
                self._on_progress("prefill", part.index * chunks + done, len(self.parts.layers) * chunks)
            return output

        with prompt_products(part.module, rows=hidden.shape[0] * tokens, keep=self.keeps_unpacked and chunks > 1):
            output = run_layer(chunk, hidden, self.chunk_tokens)
        _copy_window(self.layers[part.index])
        self.leave(part)
        return output

    def _chunk_kwargs(self, part: LayerParts, kwargs: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
        changed = dict(kwargs)
        cos, sin = kwargs["position_embeddings"]
        changed["position_embeddings"] = (cos[:, start:stop], sin[:, start:stop])
        if kwargs.get("position_ids") is not None:
            changed["position_ids"] = kwargs["position_ids"][:, start:stop]
        mask = cast(DeferredMask, kwargs["attention_mask"])
        changed["attention_mask"] = mask.chunk(
            self.implementation,
            q_offset=self._stored + start,
            q_length=stop - start,
            sizes=self.layers[part.index].get_mask_sizes(stop - start),
            dtype=cos.dtype,
        )
        return changed

    def _check_call(self, mask: Any, kwargs: dict[str, Any]) -> DeferredMask:
        if not isinstance(mask, DeferredMask):
            raise UnsupportedError("attention_mask: a prepared mask was given", hint="pass a 2-D padding mask or none")
        if kwargs.get("use_cache") is False:  # ``generate`` would give the whole input at every step
            raise UnsupportedError(
                "use_cache=False with a cache", hint="leave out one of the two, also in model.config"
            )
        if torch.is_grad_enabled():
            raise UnsupportedError("gradients are enabled", hint="call the model under torch.no_grad()")
        if kwargs.get("output_attentions") or getattr(self.parts.config, "output_attentions", False):
            raise UnsupportedError("output_attentions=True", hint="attention weights are never made; leave it off")
        return mask

    # ---- what generate may ask for and cannot have

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search moves sequences between beams; a cache on disk does not."""
        raise UnsupportedError("beam search", hint="use num_beams=1")

    def crop(self, tokens_to_remove: int) -> None:
        """Assisted decoding takes tokens back; not supported."""
        raise UnsupportedError("taking tokens back (assisted decoding)", hint="generate without an assistant model")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Several continuations of one prompt; not supported."""
        raise UnsupportedError("repeating a stored context", hint="repeat the prompt in the batch instead")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Dropping sequences of a batch; not supported."""
        raise UnsupportedError("selecting sequences of a batch", hint="run the sequences apart")


class LayerOwner(Protocol):
    """A cache that stores the K, V of its full-attention layers itself."""

    padded_tokens: int

    def extend(self, order: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new K, V ``[B, H_kv, n, d]`` of one layer; returns the K, V that attention is called with."""

    def mask_tokens(self, query_length: int) -> int:
        """Length of K in the mask of the next ``query_length`` tokens of a layer."""


class OffloadedLayer(CacheLayerMixin):
    """One full-attention layer as transformers sees it. The cache that owns it stores its K, V."""

    is_sliding = False
    is_croppable = False

    def __init__(self, owner: LayerOwner, order: int) -> None:
        super().__init__()
        self._owner, self._order = owner, order

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to set up."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take new K, V ``[B, H_kv, n, d]``."""
        return self._owner.extend(self._order, key_states, value_states)

    def get_seq_length(self) -> int:
        """Padded tokens seen."""
        return self._owner.padded_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of K in a mask."""
        return self._owner.mask_tokens(query_length), 0

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1

    def reset(self) -> None:
        """What a cache holds is dropped by closing it."""
        raise UnsupportedError("reset of a stored context", hint="leave the attach block and enter a new one")


def offloaded_layers(parts: ModelParts, owner: LayerOwner) -> list[Any]:
    """An ``OffloadedLayer`` for every full-attention layer, one like that of transformers for the others."""
    layers = list[Any]()
    for part, stock, kwargs in zip(parts.layers, stock_layers(parts), parts.layer_kwargs, strict=True):
        if part.order is not None:
            layers.append(OffloadedLayer(owner, part.order))
        else:
            layers.append(WindowLayer(**kwargs) if part.layer_type == "sliding_attention" else stock)
    return layers


def stock_layers(parts: ModelParts) -> list[Any]:
    """transformers' own in-memory state for every layer."""
    return [
        DYNAMIC_LAYER_TYPE_MAPPING[part.layer_type](**kwargs)
        for part, kwargs in zip(parts.layers, parts.layer_kwargs, strict=True)
    ]


class InMemoryLayer(DynamicLayer):
    """transformers' own layer, which keeps all K, V; a method to compare with may put its tensors elsewhere."""


class FullCache(LayerMajorCache):
    """Everything in memory, or where its ``layers`` keep it, with the same chunked prefill; for comparison."""

    def adopt(self, source: FullCache) -> None:
        """Take over what ``source`` holds. The tensors are shared: they are replaced, never written to."""
        for index, layer in enumerate(source.layers):
            self.layers[index] = copy.copy(layer)

    @property
    def stats(self) -> CacheStats:
        """Sizes now; there is no limit."""
        sizes = [sum(t.nbytes for t in (layer.keys, layer.values) if t is not None) for layer in self.layers]
        full = sum(size for size, part in zip(sizes, self.parts.layers, strict=True) if part.order is not None)
        return CacheStats(
            prefill_s=self.trace.prefill_s,
            kv_full_bytes=full,
            kv_memory_peak_bytes=full,
            sliding_kv_bytes=sum(sizes) - full,
        )

    def close(self) -> None:
        """Drop K and V; the cache is of no use afterwards."""
        self.layers.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class InMemory:
    """A way to keep K, V without a memory limit, to compare with.

    ``open(parts, implementation, config, on_progress)`` gives its cache.
    """

    name: str
    open: Callable[[ModelParts, str, Config, Progress | None], FullCache]


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """No inference mode within: its tensors could not be written to by a later call outside of it."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _copy_window(layer: Any) -> None:
    """Copy a sliding window: as a view of window and chunk it would keep both in memory."""
    if layer.is_sliding and layer.keys is not None:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
