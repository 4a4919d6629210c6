"""Path two, compiled: one token goes through a decoder layer in three calls, while groups come from disk.

``CompiledDecode`` is ``Decode`` with two differences. The groups of a layer that can be compiled
(``core/compiled_layers.py``) are chosen and looked up in one call. And such a layer runs in two: ``begin`` computes
query, key and value, and ``finish`` attends to groups where they lie in slots and computes the rest of the layer.
Python between the calls starts the reads and handles errors. Other layers go through their modules, as in ``Decode``,
which is the specification. Used by the cache, in the thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvswap.core.batch_state import BatchState, not_finite
from kvswap.core.compiled_layers import CompiledLayers
from kvswap.core.decode import Decode, real_entries
from kvswap.core.query_prediction import QueryPredictor
from kvswap.core.window_layer import WindowStep
from kvswap.memory.lookup import Found
from kvswap.models.adapter import LayerParts, ModelParts
from kvswap.native import array_loops
from kvswap.native.arrays import IntArray
from kvswap.native.step_loops import TYPES, Layer, Pinned, Pool, Scratch, Sketch, Slots
from kvswap.selection.kvswap import score
from kvswap.selection.transform_sketch import TransformSketch
from kvswap.selection.window import Step

Rope = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Choice:
    """``count`` groups are chosen by ``codes``; without codes these are all that may be chosen."""

    count: int
    codes: Sketch | None


class CompiledDecode(Decode):
    """Decode steps of ``found`` layers in compiled calls, of all others by their modules.

    ``held`` is what the cache holds of each layer of the model: of those with a sliding window, the window.
    """

    def __init__(self, state: BatchState, parts: ModelParts, found: CompiledLayers, held: Sequence[Any]) -> None:
        super().__init__(state, parts)
        self._found, self._layers, self._held = found, found.layers, held
        self.scratch = Scratch(list(found.layers.values()), state.batch, parts.dtype, state.tally.address)
        self._predictor: CompiledPredictor = CompiledPredictor(parts, self)
        self._own_choice = state.method.score is score and state.pool.compiled_lookup
        self._slots: dict[torch.dtype, Slots] = {}
        self._found_in: Pool | None = None
        self._pinned_of: tuple[Step, Pinned] | None = None
        self._ropes: dict[int, tuple[Rope, Rope]] = {}
        self._windows: dict[int, WindowStep] = {}  # by their length

    def begin_step(self) -> None:
        """Start a step. Where a module was replaced since the last one, this and all later steps go through modules."""
        super().begin_step()
        self._ropes.clear()
        self._slots.clear()
        self._windows.clear()
        if not self._found.unchanged():
            self._layers = {}

    def layer(self, part: LayerParts) -> Layer | None:
        """The compiled layer, or None where ``part`` goes through its modules."""
        return self._layers.get(part.index)

    def predict(self, layer: Layer, hidden: torch.Tensor, rope: Rope) -> torch.Tensor:
        """The query ``[B, H_q, d]`` that ``layer`` is predicted to have from ``hidden`` ``[B, 1, E]``."""
        self.use_rope(rope)
        return self.scratch.query(layer, hidden)

    def fetch_for(self, target: LayerParts, part: LayerParts, hidden: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Start the reads for ``target``; see the base class. One call plans them, where the choice is kvswap's own."""
        layer, order, step, state = self._layers.get(target.index), target.order, self.step, self.state
        assert order is not None and step is not None
        choice = None if layer is None else self.choice(order)
        if layer is None or choice is None or choice.count == 0:
            super().fetch_for(target, part, hidden, kwargs)
            return
        state.trace.lap()
        self.use_rope(self._predictor.rope(target, part, hidden, kwargs))
        half, self._half = self._half, 1 - self._half
        fetched = self.scratch.fetch(
            layer,
            hidden.contiguous(),
            choice.codes,
            self.found_in(),
            order=order,
            group_tokens=state.window.group_tokens,
            first=state.window.sink_groups,
            ends=step.ends,
            count=choice.count,
            staging_slot=state.pool.staging_slot(half),
            staging_address=state.pool.staging_address(half),
        )
        state.trace.lap("predict_s")
        if fetched is None:
            raise not_finite(order, "keys or the query are not finite, so no group can be chosen")
        self.start_planned(order, half, choice.count, *fetched)

    def start_planned(self, order: int, half: int, count: int, reads: int, out: IntArray) -> None:
        """Start the reads that ``Scratch.fetch`` planned for ``count`` groups of each sequence. A lap has begun."""
        batch, step = self.state.batch, self.step
        assert step is not None
        groups = out[: batch * count].reshape(batch, count)
        found = Found(*array_loops.found(out[batch * count :], reads, batch, count))
        self.start(order, half, found, groups, real_entries(groups, step))

    def run(self, part: LayerParts, layer: Layer, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """The output ``[B, 1, E]`` of ``part`` for the newest tokens ``hidden``; their K, V go to the rolling tail."""
        state, step, scratch, order = self.state, self.step, self.scratch, part.order
        assert step is not None
        hidden = hidden.contiguous()
        self.enter(part, hidden, kwargs)
        scratch.use_rope(*self.floats(kwargs["position_embeddings"]), layer.head_dim)
        if order is None:
            return self._run_window(part, layer, hidden)
        slots, first_pinned = self.slots_of(order), self.first_pinned[order]
        scratch.begin(layer, hidden, slots, first_pinned + step.tail, step.offset)
        fetch = self.arrive(order)
        index, valid = scratch.attended(self.pinned(step), first_pinned, fetch.found.slots, fetch.valid)
        state.trace.lap("slots_s")
        output = scratch.finish(layer, hidden, slots, index, valid, step.offset)
        state.trace.lap()
        self.keep(order, fetch)
        return output

    def _run_window(self, part: LayerParts, layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
        """The same for a layer that keeps a sliding window in memory."""
        window, slots = self.window_of(part)
        self.scratch.begin(layer, hidden, slots, window.newest, window.offset)
        output = self.scratch.finish(layer, hidden, slots, window.index, window.valid, window.last)
        self._held[part.index].advance()
        return output

    def window_of(self, part: LayerParts) -> tuple[WindowStep, Slots]:
        """Where a layer with a sliding window puts and finds tokens in this step, and its slots."""
        held, tokens = self._held[part.index], self.state.tokens
        length = held.sliding_window
        if length not in self._windows:
            self._windows[length] = WindowStep(length, tokens)
        window = self._windows[length]
        return window, held.slots(window, held.cumulative_length - tokens)

    def choice(self, order: int) -> Choice | None:
        """How a layer chooses in this step; None where compiled calls cannot choose for it."""
        state, step = self.state, self.step
        assert step is not None
        if not self._own_choice:
            return None
        count = min(state.select_groups[order], step.most_candidates)
        if not self.needs_query(order):
            return Choice(count, None)
        sketch = state.sketches[order]
        codes = sketch.compiled(state.window.group_tokens) if isinstance(sketch, TransformSketch) else None
        return None if codes is None else Choice(count, codes)

    def found_in(self) -> Pool:
        """The pool of slots, whose arrays are others after it grew or shrank."""
        pool = self.state.pool
        if self._found_in is None or self._found_in.arrays is not pool.arrays:
            self._found_in = Pool.of(
                pool.arrays,
                first=pool.reuse_start,
                gap=self._gap_groups,
                places=pool.staging_groups,
                slot_bytes=pool.layout.slot_bytes,
            )
        return self._found_in

    def pinned(self, step: Step) -> Pinned:
        """Sinks and newest groups of a step."""
        if self._pinned_of is None or self._pinned_of[0] is not step:
            self._pinned_of = step, Pinned.of(step.sinks, step.ring, step.sinks_valid, step.ring_valid)
        return self._pinned_of[1]

    def slots_of(self, order: int) -> Slots:
        """All slots, as layer ``order`` stores groups in them. They stay the same within a step."""
        pool = self.state.pool
        dtype = pool.dtypes[order]
        found = self._slots.get(dtype)
        if found is None:
            count, size_bytes = pool.reuse_start + pool.reuse_slots, pool.layout.slot_bytes
            found = Slots(pool.slab.address, count, size_bytes, TYPES[dtype], pool.window.group_tokens)
            self._slots[dtype] = found
        return found

    def use_rope(self, rope: Rope) -> None:
        """Use cos and sin ``[B or 1, 1, d]`` for the next calls."""
        self.scratch.use_rope(*self.floats(rope), self.state.shape.head_dim)

    def floats(self, rope: Rope) -> Rope:
        """cos and sin as float32, converted once in a step."""
        if rope[0].dtype == torch.float32:
            return rope
        key = id(rope[0])
        if key not in self._ropes:  # with the tensors themselves, so that no other gets their number in this step
            self._ropes[key] = rope, (rope[0].float(), rope[1].float())
        return self._ropes[key][1]


class CompiledPredictor(QueryPredictor):
    """Predicts queries of compiled layers in one call each."""

    def __init__(self, parts: ModelParts, decode: CompiledDecode) -> None:
        super().__init__(parts)
        self._decode = decode

    def query(self, target: LayerParts, part: LayerParts, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """The query of ``target``; see the base class."""
        layer = self._decode.layer(target)
        if layer is None:
            return super().query(target, part, hidden, kwargs)
        return self._decode.predict(layer, hidden.contiguous(), self.rope(target, part, hidden, kwargs))
