"""A whole decode step in one compiled call, where every layer of a model can be compiled and hands on what it gets.

The call of the first layer computes all layers (``native/run.c``), and the model passes its result through the others.
Python is only needed where groups have to be read: it starts the reads of the next layer and waits for those of this
one, as ``CompiledDecode`` does for a single layer. Used by the cache, in the thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvswap.core.batch_state import BatchState, not_finite
from kvswap.core.compiled_layers import CompiledLayers
from kvswap.core.compiled_step import CompiledDecode
from kvswap.core.decode import Fetch, real_entries
from kvswap.errors import ModelError
from kvswap.models.adapter import LayerParts, ModelParts
from kvswap.native.arrays import BoolArray, IntArray
from kvswap.native.run_loops import NOT_FINITE, READS, Run
from kvswap.native.step_loops import Layer
from kvswap.selection.window import Step


class CompiledRun(CompiledDecode):
    """Decode steps through all layers at once. ``found`` are ``joined``.

    A step goes layer by layer where a layer cannot be chosen for in compiled calls, where a module was replaced, and
    where somebody has put another forward before that of kvswap.
    """

    def __init__(self, state: BatchState, parts: ModelParts, found: CompiledLayers, held: Sequence[Any]) -> None:
        super().__init__(state, parts, found, held)
        self._type, self._parts = type(parts.model).__name__, parts.layers
        self._orders = [part.order for part in parts.layers]
        self._modules = [part.module.__dict__ for part in parts.layers]
        self._forwards = self._found_forwards()
        self._run = Run(
            [found.layers[part.index] for part in parts.layers],
            self._orders,
            self.first_pinned,
            self.scratch,
            most=max(*state.select_groups, state.window.most_select_groups),
            sinks=state.window.sink_groups,
            ring=state.window.ring_groups,
        )
        self._passed: tuple[torch.Tensor, int, Step] | None = None  # the output, its version, and the step it is of

    @property
    def at_once(self) -> bool:
        """Whether the latest step went through all layers in one call."""
        return self._passed is not None

    def begin_step(self) -> None:
        """Start a step; see the base class."""
        super().begin_step()
        self._passed = None

    def run(self, part: LayerParts, layer: Layer, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """The output ``[B, 1, E]`` of ``part``: of the first layer that of the last one, which the others pass on."""
        if part.index == 0 and self._found_forwards() == self._forwards and self._describe(hidden, kwargs):
            return self._go_through(hidden.contiguous().clone())
        if self._passed is None:
            return super().run(part, layer, hidden, kwargs)
        output, version, _ = self._passed
        if hidden is not output or hidden._version != version:  # tried at attach; the layers after it are computed now
            raise ModelError(
                f"{self._type}: hidden states are changed between layers", hint="set compiled_step to off for that"
            )
        return hidden

    def chosen(self, order: int) -> tuple[IntArray, BoolArray | None]:
        """What a layer chose in its last step; see the base class."""
        if self._passed is None:
            return super().chosen(order)
        groups = self._run.groups_of(self._orders.index(order))
        return groups, real_entries(groups, self._passed[2])

    def _describe(self, hidden: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        """Say what each layer does in this step. False where one of them cannot be chosen for in compiled calls."""
        run, first = self._run, self._parts[0]
        for part in self._parts:
            run.use_rope(part.index, self.floats(self._predictor.rope(part, first, hidden, kwargs)))
            if part.order is None:
                window, slots = self.window_of(part)
                run.describe_window(part.index, window.struct, slots)
                continue
            choice = self.choice(part.order)
            if choice is None:
                return False
            run.describe(part.index, choice.count, choice.codes, self.slots_of(part.order))
        return True

    def _go_through(self, output: torch.Tensor) -> torch.Tensor:
        """All layers, from their input to their output in ``output``. Raises DamagedError, DiskError."""
        state, step, run, pool, trace = self.state, self.step, self._run, self.state.pool, self.state.trace
        assert step is not None
        run.begin(
            output,
            self.found_in(),
            self.pinned(step),
            group_tokens=state.window.group_tokens,
            first=state.window.sink_groups,
            ends=step.ends,
            tail=step.tail,
            offset=step.offset,
            staging_slots=(pool.staging_slot(0), pool.staging_slot(1)),
            staging_addresses=(pool.staging_address(0), pool.staging_address(1)),
        )
        started, arrived, orders = 0, None, self._orders
        while (done := run.go_on()) == READS:
            trace.lap()
            self._keep_arrived(arrived)
            for number in range(max(started, run.at), min(run.at + 2, len(orders))):
                order, reads = orders[number], run.reads(number)
                if reads and order is not None:
                    self.start_planned(order, number % 2, run.layers[number].count, reads, run.out(number))
                started = number + 1
            here = orders[run.at]
            arrived = (here, self.arrive(here)) if here is not None and run.reads(run.at) else None
            trace.lap("slots_s")
        if done == NOT_FINITE:
            chosen = orders[run.chosen]
            assert chosen is not None  # a layer with a window chooses nothing
            raise not_finite(chosen, "keys or the query are not finite, so no group can be chosen")
        trace.lap()
        self._keep_arrived(arrived)
        for part in self._parts:
            if part.order is None:
                self._held[part.index].advance()
        trace.selected_groups += run.selected
        trace.reused_groups += run.selected
        trace.predict_s += run.predict_s
        trace.slots_s += run.slots_s
        self._passed = output, output._version, step
        return output

    def _keep_arrived(self, arrived: tuple[int, Fetch] | None) -> None:
        """Keep what a layer has read, now that it has attended to it. The lap ends."""
        if arrived is not None:
            self.keep(*arrived)

    def _found_forwards(self) -> list[Any]:
        """The layers' forwards. They are those of ``model_patch``, unless somebody has put another one before it."""
        return [each.get("forward") for each in self._modules]
