"""A whole decode step in one compiled call, where every layer of a model can be compiled and hands on what it gets.

The call of the first layer computes all layers (``native/run.c``), and the model passes its result through the others.
Python is only needed where groups have to be read: it starts the reads of the next layer and waits for those of this
one, with the same functions as a single layer's path in ``core/compiled_step.py``, which makes one. One thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from kvswap.core.batch_state import not_finite
from kvswap.core.decode import real_entries
from kvswap.errors import ModelError
from kvswap.memory.lookup import Found
from kvswap.models.adapter import ModelParts
from kvswap.native import array_loops
from kvswap.native.arrays import BoolArray, IntArray
from kvswap.native.run_loops import NOT_FINITE, READS, Run
from kvswap.native.step_loops import Layer
from kvswap.selection.window import Step

if TYPE_CHECKING:
    from kvswap.core.compiled_step import CompiledDecode


class CompiledRun:
    """The steps of one ``CompiledDecode`` through all layers at once."""

    def __init__(self, decode: CompiledDecode, parts: ModelParts, layers: dict[int, Layer]) -> None:
        state, window = decode.state, decode.state.window
        self._decode, self._type = decode, type(parts.model).__name__
        self._modules = [part.module.__dict__ for part in parts.layers]
        self._forwards = self._found_forwards()
        self._orders = range(len(layers))
        self._run = Run(
            list(layers.values()),
            decode.first_pinned,
            decode.scratch,
            most=max(state.select_groups),
            sinks=window.sink_groups,
            ring=window.ring_groups,
        )
        self._output: torch.Tensor | None = None
        self._step: Step | None = None

    def begin_step(self) -> None:
        """Forget the last step's output."""
        self._output = None

    def run(self, hidden: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor | None:
        """The output ``[B, 1, E]`` of all layers for the first one's input, or None where they have to go one by one.

        Raises DamagedError, DiskError.
        """
        decode, step = self._decode, self._decode.step
        assert step is not None
        if self._found_forwards() != self._forwards or not self._describe(step):
            return None
        state, run, pool, output = decode.state, self._run, decode.state.pool, hidden.clone()
        decode.use_rope(rope)
        run.begin(
            output,
            decode.found_in(),
            decode.pinned(step),
            group_tokens=state.window.group_tokens,
            first=state.window.sink_groups,
            ends=step.ends,
            tail=step.tail,
            offset=step.offset,
            staging_slots=(pool.staging_slot(0), pool.staging_slot(1)),
            staging_addresses=(pool.staging_address(0), pool.staging_address(1)),
        )
        self._go_through(step)
        self._output, self._step = output, step
        return output

    def passed(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """What a later layer gives: its input, where the first layer computed them all, else None."""
        if self._output is None:
            return None
        if hidden is not self._output:  # tried at attach; here it is too late, the next layers have been computed
            raise ModelError(
                f"{self._type}: hidden states are changed between layers", hint="set compiled_step to off for that"
            )
        return hidden

    def groups(self, order: int) -> tuple[IntArray, BoolArray | None] | None:
        """What layer ``order`` chose in the last step; None where that went layer by layer."""
        if self._output is None or self._step is None:
            return None
        batch = self._run.batch
        groups = self._run.groups[order, : batch * self._run.layers[order].count].reshape(batch, -1)
        return groups, real_entries(groups, self._step)

    def _describe(self, step: Step) -> bool:
        """Say how the layers choose in this step. False where one of them cannot be chosen for in compiled calls."""
        decode, select = self._decode, self._decode.state.select_groups
        for order in self._orders:
            codes = None
            if step.most_candidates > select[order] > 0:
                codes = decode.codes(order)
                if codes is None:
                    return False
            self._run.describe(order, min(select[order], step.most_candidates), codes, decode.slots_of(order))
        return True

    def _go_through(self, step: Step) -> None:
        decode, run, trace = self._decode, self._run, self._decode.state.trace
        started, keep = 0, _nothing
        while (done := run.go_on()) == READS:
            trace.lap()
            keep()
            for number in range(max(started, run.at), min(run.at + 2, len(self._orders))):
                if run.reads(number):
                    groups, out = run.found(number)
                    found = Found(*array_loops.found(out, run.reads(number), run.batch, groups.shape[1]))
                    decode.start(number, number % 2, found, groups, real_entries(groups, step))
                started = number + 1
            keep = self._arrive(run.at) if run.reads(run.at) else _nothing
        if done == NOT_FINITE:
            raise not_finite(run.chosen, "keys or the query are not finite, so no group can be chosen")
        trace.lap()
        keep()
        trace.selected_groups += run.selected
        trace.reused_groups += run.selected
        predict_s, slots_s = run.times_s
        trace.predict_s += predict_s
        trace.slots_s += slots_s

    def _arrive(self, order: int) -> Callable[[], None]:
        """Wait for the reads of a layer. What is returned keeps its groups, once it has attended to them."""
        fetch = self._decode.arrive(order)
        self._decode.state.trace.lap("slots_s")

        def keep() -> None:
            self._decode.keep(order, fetch)

        return keep

    def _found_forwards(self) -> list[Any]:
        """The layers' forwards. They are those of ``model_patch``, unless somebody has put another one before it."""
        return [each.get("forward") for each in self._modules]


def _nothing() -> None:
    """Keep nothing."""
