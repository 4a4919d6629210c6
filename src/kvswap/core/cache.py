"""The transformers Cache object of a context on disk: what ``generate`` sees.

``KVSwapCache`` keeps full-attention layers on disk. Layers with a sliding window keep transformers' own state in
memory. The cache never sees token ids: as with any transformers cache, the caller vouches that the stored tokens are a
prefix of the input.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.config import Config
from kvswap.core.batch_state import BatchState, Shape, open_state
from kvswap.core.binding import Binding
from kvswap.core.cache_stats import CacheStats
from kvswap.core.compiled_layers import CompiledLayers
from kvswap.core.compiled_run import CompiledRun
from kvswap.core.compiled_step import CompiledDecode
from kvswap.core.decode import Decode
from kvswap.core.layer_major import AttentionInput, FullCache, LayerForward, LayerMajorCache, Progress, offloaded_layers
from kvswap.core.load_or_recompute import Rates
from kvswap.core.prefill import Prefill
from kvswap.core.prompt_memory import check_free_memory, prompt_needs
from kvswap.core.window_layer import WindowLayer
from kvswap.disk.backend import ReadBackend
from kvswap.errors import UnsupportedError
from kvswap.memory.budget import PROMPT_PARTS
from kvswap.models.adapter import LayerParts, ModelParts
from kvswap.models.masks import DeferredMask, left_pads
from kvswap.selection.method import Method, SketchMaker
from kvswap.selection.sketch import LayerSketch
from kvswap.selection.tally import Tally
from kvswap.units import format_bytes, format_parts

_log = logging.getLogger("kvswap")


class KVSwapCache(LayerMajorCache):
    """Full-attention layers on disk, a sketch of their keys in memory. Made by ``attach``; one batch for its life."""

    def __init__(
        self,
        parts: ModelParts,
        implementation: str,
        *,
        config: Config,
        method: Method,
        backend: ReadBackend,
        makers: Sequence[SketchMaker],
        store_dtype: torch.dtype,
        check_space: Callable[[int], None],
        on_progress: Progress | None,
        binding: Binding | None = None,
        compiled: CompiledLayers | None = None,
        share: int = 0,
    ) -> None:
        layers = offloaded_layers(parts, self)
        super().__init__(parts, implementation, layers, chunk_tokens=config.chunk_tokens, on_progress=on_progress)
        self.config, self.method, self.padded_tokens = config, method, binding.tokens if binding else 0
        self._backend, self._makers, self._check_space, self._share = backend, makers, check_space, share
        self._shape = Shape(
            layers=len(parts.offloaded),
            query_heads=parts.query_heads,
            kv_heads=parts.kv_heads,
            head_dim=parts.head_dim,
            scaling=parts.scaling,
            dtype=parts.dtype,
            store_dtype=store_dtype,
            device=parts.device,
        )
        self._binding = binding
        self._recomputing, self._rates = False, Rates()
        self.after_prompt: Callable[[], None] | None = None
        """Called once, between forwards, when a prompt is through, by the thread that runs the model."""
        if binding is not None:
            binding.restore_layers(layers, [part.order for part in parts.layers], parts.dtype, parts.device)
        self._state: BatchState | None = None
        self._decode: Decode | None = None
        self._prefill: Prefill | None = None
        self._pads: NDArray[np.int64] = np.zeros(0, np.int64)
        # with positions in two dimensions, a picture takes fewer positions than tokens
        self._counts_pictures = "mrope_section" in repr(getattr(parts.config, "rope_parameters", None))
        self._decode_type: type[Decode] = method.decode or Decode
        self._open_decode: Callable[[BatchState, ModelParts], Decode] = self._decode_type
        if compiled is not None and compiled.layers and self._decode_type is Decode and method.slots is None:
            kind, held = CompiledRun if compiled.joined else CompiledDecode, self.layers
            self._open_decode = partial(kind, found=compiled, held=held)

    # ---- a forward

    def begin(self, hidden: torch.Tensor, mask: DeferredMask) -> None:
        """Start a prompt or a decode step; the first prompt opens the batch state."""
        super().begin(hidden, mask)
        batch, tokens = hidden.shape[:2]
        padding = mask.padding
        transient_bytes = 0
        if not self._decoding:
            appended, implementation = self._stored > 0, self.implementation
            needs = prompt_needs(self.parts, self._shape, self.config, hidden, implementation, appended=appended)
            transient_bytes, self.keeps_unpacked = check_free_memory(needs, self.parts, hidden.device)
        answer_tokens, self.answer_tokens = self.answer_tokens, 0
        if self._state is not None and self.config.kv_memory != "auto":
            self._state.needs.check_answer(self._state.ledger.limit_bytes, self._stored + tokens, answer_tokens)
        if self._state is None:
            self._pads = left_pads(padding, batch, self._stored + tokens)
            self._state = self._open(batch, self._stored + tokens, answer_tokens)
            self._decode = self._open_decode(self._state, self.parts)
        elif batch != self._state.batch:
            raise UnsupportedError(f"batch of {batch} on a cache of {self._state.batch}", hint="attach anew for it")
        elif padding is not None and not bool(padding[:, self._stored :].all()):
            raise UnsupportedError("padding after stored tokens", hint="continue sequences of a batch by equal lengths")
        assert self._decode is not None
        if self._decoding:
            self._prefill = None
            self._decode.begin_step()
        else:
            store, pads = self._state.store, np.zeros_like(self._pads) if self._stored else self._pads
            store.streamed_bytes, store.streamed_s = 0, 0.0
            self._prefill = Prefill(self._state, tokens, pads, recompute=self._recomputing)
            reserved, filled = self._state.ledger.reserved, self._stored or self._recomputing
            lasting_bytes = sum(reserved.values())
            if not filled:
                slots_bytes = min(reserved["slots"], self._state.needs.groups_bytes(tokens))
                lasting_bytes = sum(reserved[part] for part in PROMPT_PARTS) + slots_bytes
            self.trace.prefill_peak_bytes = max(self.trace.prefill_peak_bytes, transient_bytes + lasting_bytes)

    def run_layer(self, part: LayerParts, forward: LayerForward, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        """Run one decoder layer; see the base class."""
        if part.index == 0 and not self._running:
            self._check_positions(kwargs.get("position_ids"))
        output = super().run_layer(part, forward, hidden, kwargs)
        if self.after_prompt is not None and not self._decoding and not self._running:
            after_prompt, self.after_prompt = self.after_prompt, None
            after_prompt()
        return output

    def end(self, tokens: int) -> None:
        """Count the tokens of this forward as stored."""
        super().end(tokens)
        assert self._decode is not None
        if self._prefill is not None:
            self._prefill.done()
            self._prefill, self._recomputing = None, False
            self._rates = self._rates.better(self._measured(tokens))
        else:
            self._decode.end_step()
            self.trace.decode_s += time.perf_counter() - self._started_s
        self.padded_tokens += tokens

    def leave(self, part: LayerParts) -> None:
        """Hand the layer's K, V of a prompt to disk and sketch."""
        if part.order is not None and self._prefill is not None:
            self._prefill.finish(part.order)

    def decode_layer(
        self, part: LayerParts, forward: LayerForward, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> Any:
        """Start what the next layer needs, then run this one."""
        assert self._decode is not None
        call = kwargs.get("kvswap_call")
        # In a batch of caches the call is another one's, and this cache gets its row of a layer that is not compiled.
        if isinstance(self._decode, CompiledDecode) and getattr(call, "cache", None) is self:
            layer = self._decode.layer(part)
            if layer is not None:
                kwargs["kvswap_call"].attended = True
                return self._decode.run(part, layer, hidden, kwargs)
        self._decode.enter(part, hidden, kwargs)
        if part.order is None:
            return super().decode_layer(part, forward, hidden, kwargs)
        return forward(hidden, **{**kwargs, "attention_mask": None})

    def attention(self, given: AttentionInput) -> torch.Tensor:
        """Prefill: exact over the prompt (and the stored context). Decode: exact over what was selected."""
        order, query = given.part.order, given.query
        assert self._decode is not None and order is not None

        def attend(keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            if self._prefill is None and mask is not None and self.implementation == "eager":  # which adds its mask
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
            return super(KVSwapCache, self).attention(replace(given, keys=keys, values=values, mask=mask))

        if self._prefill is None:
            return self._decode.attention(order, query, attend)
        if self._prefill.appending:
            return self._prefill.attend(order, query, softcap=given.softcap, sink_logits=given.sink_logits)
        return attend(given.keys, given.values, given.mask)

    def adopt(self, source: FullCache) -> None:
        """Take over the prompt that ``source`` holds, as if this cache had computed it. Both unpadded, this one empty.

        Comparing methods takes one computation of each prompt then. It differs by the rounding of what is stored.
        """
        if self._state is not None:
            raise ValueError("a cache adopts a prompt once, before anything else")
        batch, _, tokens, _ = source.layers[self.parts.offloaded[0].index].keys.shape
        self._pads = np.zeros(batch, np.int64)
        self._state = self._open(batch, tokens)
        self._decode = self._open_decode(self._state, self.parts)
        prefill = Prefill(self._state, tokens, self._pads)
        for part in self.parts.layers:
            layer = source.layers[part.index]
            if part.order is None:
                self.layers[part.index].take_over(layer)
            else:
                prefill.extend(part.order, layer.keys, layer.values)
                prefill.finish(part.order)
        prefill.done()
        self.padded_tokens = tokens

    def extend(self, order: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new K, V ``[B, H_kv, n, d]`` of one offloaded layer; see ``LayerOwner``."""
        if self._prefill is not None:
            return self._prefill.extend(order, keys, values)
        assert self._decode is not None
        self._decode.put(order, keys, values)
        return keys, values

    def mask_tokens(self, query_length: int) -> int:
        """Length of K in the mask of the next chunk: the prompt so far, or everything while no prompt runs."""
        if self._prefill is None:
            return self.padded_tokens + query_length
        return self._prefill.filled_tokens + query_length

    def _check_positions(self, position_ids: torch.Tensor | None) -> None:
        """Raise UnsupportedError where new tokens do not begin behind the stored ones: a prompt given twice."""
        if position_ids is None or position_ids.dim() != 2 or self._state is None or self._counts_pictures:
            return
        first, stored = position_ids[:, 0].cpu().numpy(), self.padded_tokens - self._pads
        if (first != stored).any():
            raise UnsupportedError(
                f"the input begins at position {int(first[0]):,}, but {int(stored[0]):,} tokens are stored",
                hint="pass the stored tokens and new ones after them, or keep fewer with cache.truncate(tokens)",
            )

    def _open(self, batch: int, tokens: int, answer_tokens: int = 0) -> BatchState:
        binding = self._binding
        if binding is not None and (batch != 1 or self._pads.any()):
            raise UnsupportedError("a batch or padding in a session", hint="a session is one sequence without padding")
        state = open_state(
            self.config,
            self.method,
            self._shape,
            self._backend,
            self._makers,
            batch=batch,
            tokens=tokens,
            trace=self.trace,
            check_space=self._check_space,
            files=binding.files(self._backend, self._shape.layers) if binding else None,
            alignment_bytes=binding.alignment_bytes if binding else 0,
            answer_tokens=answer_tokens,
            share=self._share,
        )
        if binding is not None:
            binding.restore(state)
        parts, limit = format_parts(state.ledger.reserved), format_bytes(state.ledger.limit_bytes)
        _log.debug("plan for %d x %d tokens under %s: %s", batch, tokens, limit, parts)
        return state

    # ---- going back

    @property
    def can_truncate(self) -> bool:
        """Whether ``truncate`` works: not with sliding-window layers, in a session, or with most other methods."""
        sketches = self._state.sketches if self._state is not None else []
        own = self.method.slots is None and all(isinstance(each, LayerSketch) for each in sketches)
        return own and self._binding is None and all(part.order is not None for part in self.parts.layers)

    def truncate(self, tokens: int) -> None:
        """Keep the first ``tokens`` tokens, padding included, as if no more had come; between forwards only.

        So a prompt can be asked again, or one that begins alike. Raises UnsupportedError unless ``can_truncate``,
        DiskError.
        """
        if tokens == self.padded_tokens:
            return
        if not 0 < tokens < self.padded_tokens or (tokens <= self._pads).any():
            hint = "keep at least one token of every sequence"
            raise UnsupportedError(f"truncating {self.padded_tokens:,} tokens to {tokens:,}", hint=hint)
        if not self.can_truncate or self._running or self._state is None:
            hint = "use Session.truncate" if self._binding else "leave the attach block and enter a new one"
            raise UnsupportedError("truncating this cache", hint=hint)
        self._state.truncate(tokens - self._pads)
        self.padded_tokens = tokens

    # ---- a session

    def commit(self, ids: Sequence[int], conversation: bytes = b"", *, interim: bool = False) -> None:
        """Make the context durable, in a cache of a session; between forwards only.

        ``ids`` are the token ids of the context, at most one more than tokens stored. ``conversation`` is stored with
        them. The next commit replaces an ``interim`` one. Raises DiskWriteError, DiskFullError.
        """
        if self._binding is None or self._state is None or self._running:
            raise UnsupportedError("a commit without a session, or within a forward", hint="attach with a session")
        self._binding.commit(self._state, ids, conversation, interim=interim, rates=self._rates)

    def recompute(self) -> None:
        """Have the next forward be given the whole context: what is stored of it is computed, not read.

        Exact either way; K, V on disk stay. Between forwards only. Not for models with sliding-window layers, whose
        state cannot go back to the beginning.
        """
        if any(part.order is None for part in self.parts.layers):
            raise UnsupportedError("computing again with sliding-window layers", hint="go on from what is stored")
        self._recomputing, self.padded_tokens = self.padded_tokens > 0, 0

    def _measured(self, tokens: int) -> Rates:
        """The rates of this machine, as the prompt that has just ended shows them."""
        assert self._state is not None
        store, took_us = self._state.store, int(1e6 * (time.perf_counter() - self._started_s))
        if not self._stored:
            return Rates(prefill_tokens=tokens, prefill_us=took_us)
        layer_bytes = self._shape.layers * self._state.layout.slot_bytes
        return Rates(
            load_tokens=store.streamed_bytes // layer_bytes * self.config.group_tokens,
            load_us=int(1e6 * store.streamed_s),
        )

    # ---- what users see

    @property
    def decode(self) -> Decode | None:
        """The path of decode steps, once there is a context."""
        return self._decode

    @property
    def shared_selection(self) -> bool:
        """Whether all heads attend to the same groups, with K, V as they are stored."""
        return self._decode_type.shared_selection

    @property
    def stats(self) -> CacheStats:
        """Counters and sizes up to now."""
        state, trace, counters = self._state, self.trace, self._backend.counters
        if state is None:
            return CacheStats(backend=self._backend.name, direct_io=self._backend.direct)
        shape = self._shape
        return CacheStats(
            prefill_s=trace.prefill_s,
            calibration_s=trace.calibration_s,
            decode_steps=trace.decode_steps,
            decode_s=trace.decode_s,
            predict_s=trace.predict_s,
            slots_s=trace.slots_s,
            submit_s=trace.submit_s,
            kv_full_bytes=int(state.tokens.sum()) * shape.layers * state.layout.geometry.token_bytes,
            kv_memory_limit_bytes=state.ledger.limit_bytes,
            kv_memory_peak_bytes=state.ledger.peak_bytes,
            memory_parts=dict(state.ledger.peaks),
            sliding_kv_bytes=_bytes_in(self.layers),
            prefill_peak_bytes=trace.prefill_peak_bytes,
            disk_write_bytes=counters.write_bytes,
            disk_read_bytes=counters.read_bytes,
            disk_reads=counters.reads,
            select_tokens=state.attended_tokens,
            mass_kept=state.tally.mass_kept if self.method.scores_mass else None,
            choices=state.tally.choices,
            selected_groups=trace.selected_groups,
            reuse_slots=state.pool.reuse_slots,
            reuse_rate=trace.reused_groups / max(1, trace.selected_groups),
            io_wait_s=counters.wait_s,
            backend=self._backend.name,
            direct_io=self._backend.direct,
            sketch=self._makers[0].label,
        )

    @property
    def tally(self) -> Tally | None:
        """What decode steps attended to; None before the first prompt, and where the method does not estimate it."""
        return self._state.tally if self._state is not None and self.method.scores_mass else None

    def close(self) -> None:
        """Drop the files and the memory; the cache is of no use afterwards."""
        try:
            if self._prefill is not None:  # one that broke off may have reads in flight
                self._prefill.close()
        finally:
            (self._state or self._backend).close()


def _bytes_in(layers: Sequence[Any]) -> int:
    return sum(layer.size_bytes for layer in layers if isinstance(layer, WindowLayer))
