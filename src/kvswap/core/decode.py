"""Path two: one token goes through the layers while the groups that it needs come from disk.

On entry to a layer, ``enter`` predicts which groups the next offloaded layer will attend to and starts their reads.
The reads run while the layer computes. ``attention`` of the next layer waits for them, puts sinks, selected groups,
recent window and rolling tail in order of position, and hands K, V to the model's own attention. Nothing here loops
over groups or tokens. Used by the cache, in the thread that runs the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from kvswap.core.batch_state import BatchState, not_finite
from kvswap.core.query_prediction import QueryPredictor
from kvswap.errors import DiskError
from kvswap.memory.lookup import Found, find
from kvswap.models.adapter import LayerParts, ModelParts
from kvswap.native.arrays import BoolArray, IntArray
from kvswap.selection.choose import top_groups
from kvswap.selection.window import Step

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""The model's own attention over K, V ``[B, H_kv, S, d]`` under a mask."""


class Fetch(NamedTuple):
    """Groups of one layer whose reads are in flight, if there are any: else ``ticket`` is None.

    ``groups`` ``[B, n]`` are in order of position. ``valid`` ``[B, n]`` tells which entries are real, None: all.
    """

    ticket: int | None
    half: int
    found: Found
    groups: IntArray
    valid: BoolArray | None

    @property
    def chosen(self) -> IntArray:
        """Numbers of the groups, ``[B, n]``; 0 where an entry is not real."""
        return self.groups if self.valid is None else np.where(self.valid, self.groups, 0)


class Decode:
    """Decode steps over one state: one step at a time, layers in order.

    ``parts`` may be None where queries are given to ``prefetch`` instead of being predicted, as benchmarks do.
    """

    shared_selection = True
    """Whether all heads attend to the same groups, with K, V as they are stored."""
    predictor = QueryPredictor

    def __init__(self, state: BatchState, parts: ModelParts | None = None) -> None:
        self.state = state
        self._predictor = self.predictor(parts) if parts is not None else None
        self.first_pinned = [
            np.array([state.pool.first_pinned_slot(layer, b) for b in range(state.batch)], np.int64)
            for layer in range(state.shape.layers)
        ]
        self._fetches: dict[int, Fetch] = {}
        self._latest: dict[int, Fetch] = {}  # what each layer attended to in its last step
        self._half = 0
        self._gap_groups = state.config.read_gap_bytes // state.layout.slot_bytes
        self.step: Step | None = None

    def begin_step(self) -> None:
        """Start a step: one more token for every sequence."""
        tokens = self.state.tokens + 1
        self._wait_for_abandoned()
        self.state.ensure_capacity(int(tokens.max()))
        step = self.step = self.state.window.step(tokens)
        if step.new_group:
            self.state.trace.lap()
            for layer in range(self.state.shape.layers):
                self.state.flush_ring(layer, step)
            self.state.trace.lap("slots_s")
        if self._predictor is not None:
            self._predictor.begin_step()

    def end_step(self) -> None:
        """All layers are through."""
        self.state.tokens += 1
        self.state.trace.decode_steps += 1
        self.step = None

    def chosen(self, order: int) -> tuple[IntArray, BoolArray | None]:
        """Groups ``[B, n]`` that a layer chose in its last step, and which are real, None: all."""
        fetch = self._latest[order]
        return fetch.groups, fetch.valid

    def needs_query(self, layer: int) -> bool:
        """Whether groups of this layer have to be chosen: not when all candidates fit, and not when none may be."""
        assert self.step is not None
        return self.step.most_candidates > self.state.select_groups[layer] > 0

    def enter(self, part: LayerParts, hidden: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Start the reads for the layer after ``part``, from the input ``hidden`` ``[B, 1, E]`` of ``part``."""
        assert self._predictor is not None
        for target in self._predictor.targets(part):
            self.fetch_for(target, part, hidden, kwargs)

    def fetch_for(self, target: LayerParts, part: LayerParts, hidden: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Start the reads for ``target``, from the input ``hidden`` ``[B, 1, E]`` of ``part``."""
        assert self._predictor is not None and target.order is not None
        query = None
        if self.needs_query(target.order):
            self.state.trace.lap()
            query = self._predictor.query(target, part, hidden, kwargs)
            self.state.trace.lap("predict_s")
        self.prefetch(target.order, query)

    def prefetch(self, layer: int, query: torch.Tensor | None) -> None:
        """Choose the groups of ``layer`` by ``query`` ``[B, H_q, d]`` and start reading those not in memory.

        ``query`` may be None where ``needs_query`` is false.
        """
        state, step = self.state, self.step
        assert step is not None
        state.trace.lap()
        groups, valid = self.choose(layer, query, step)
        state.trace.lap("predict_s")
        self.fetch(layer, groups, valid)

    def fetch(self, layer: int, groups: IntArray, valid: BoolArray | None) -> None:
        """Start reading those of ``groups`` ``[B, n]`` of ``layer`` that are not in memory. A lap has begun."""
        state, step = self.state, self.step
        assert step is not None
        half, self._half = self._half, 1 - self._half
        found = find(state.pool, layer, groups, step.ends, gap_groups=self._gap_groups, half=half)
        state.trace.lap("slots_s")
        state.pool.wait_published(half)
        self.start(layer, half, found, groups, valid)

    def start(self, layer: int, half: int, found: Found, groups: IntArray, valid: BoolArray | None) -> None:
        """Start the reads that were planned for ``layer``, if any. A lap has begun."""
        trace = self.state.trace
        ticket = self.submit(found) if found.filled else None
        trace.lap("submit_s")
        self._fetches[layer] = Fetch(ticket, half, found, groups, valid)
        trace.selected_groups += found.selected
        trace.reused_groups += found.selected - len(found.staged)

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take the newest token's K, V ``[B, H_kv, 1, d]`` into the rolling tail."""
        state, step = self.state, self.step
        assert step is not None
        state.trace.lap()
        state.pool.put_token(layer, self.first_pinned[layer] + step.tail, step.offset, keys, values)
        state.trace.lap("slots_s")

    def attention(self, layer: int, query: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Attention of the newest token in ``layer`` over what was selected; ``query`` ``[B, H_q, 1, d]``."""
        return attend(*self.collect(layer))

    def collect(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Wait for the reads of ``layer``; returns K, V ``[B, H_kv, S, d]`` in order of position, and a mask.

        The mask is boolean ``[B, 1 or H_q, 1, S]``, or None where all heads of all sequences attend to everything.
        """
        state, step = self.state, self.step
        assert step is not None
        fetch = self.arrive(layer)
        slots, valid = step.attended(self.first_pinned[layer], fetch.found.slots, fetch.valid)
        kv = self.gather(layer, slots, fetch, step)
        mask = self.mask(layer, valid, slots.shape[1], step)
        if mask is None:
            kv = kv[:, :, :, : kv.shape[3] - state.window.group_tokens + int(step.offset[0]) + 1]
        self.keep(layer, fetch)
        return kv[0], kv[1], mask

    def arrive(self, layer: int) -> Fetch:
        """Wait for the reads of ``layer``; then its groups are in their slots. A lap begins."""
        state = self.state
        fetch = self._latest[layer] = self._fetches.pop(layer)
        if fetch.ticket is not None:
            state.store.backend.wait(fetch.ticket)
        state.trace.lap()
        found = fetch.found
        if fetch.ticket is not None and state.store.checked:
            rows = layer * state.batch + found.sequences
            state.store.unseal(rows, found.groups, *state.pool.staged(fetch.half, found.staged))
        state.pool.publish(fetch.half, found.filled)
        return fetch

    def keep(self, layer: int, fetch: Fetch) -> None:
        """Keep what was read for ``layer`` where that is worth more than what a slot holds. The lap ends."""
        if fetch.ticket is not None:
            self.state.pool.admit(layer, fetch.found.sequences, fetch.found.groups, fetch.found.staged)
        self.state.trace.lap("slots_s")

    # ---- parts of the path that a published method may replace (lab/rivals/parts/decoding.py)

    def choose(self, layer: int, query: torch.Tensor | None, step: Step) -> tuple[IntArray, BoolArray | None]:
        """Groups to attend to, ``[B, n]`` ascending, and which entries are real (None: all)."""
        state, first, count = self.state, self.state.window.sink_groups, self.state.select_groups[layer]
        if step.most_candidates <= count:
            groups = np.tile(np.arange(first, first + step.most_candidates), (state.batch, 1))
        elif count == 0:
            groups = np.zeros((state.batch, 0), np.int64)
        else:
            assert query is not None
            scores = state.method.score(state.sketches[layer], query, state.shape.scaling, state.window.group_tokens)
            groups, unusable = _best_groups(scores, first, step.ends, count)
            if unusable:
                raise not_finite(layer, "keys or the query are not finite, so no group can be chosen")
            if state.method.scores_mass:
                state.tally.add(scores, groups, first, step.ends)
        return groups, real_entries(groups, step)

    def submit(self, found: Found) -> int:
        """Start the reads; returns the ticket to wait for."""
        return self.state.store.submit(found.rows, found.first, found.counts, found.addresses)

    def gather(self, layer: int, slots: IntArray, fetch: Fetch, step: Step) -> torch.Tensor:
        """K, V of slots ``[B, W]`` as ``[2, B, H_kv, W * G, d]``."""
        return self.state.pool.gather(layer, slots, self.state.shape.dtype)

    def mask(self, layer: int, valid: BoolArray | None, width: int, step: Step) -> torch.Tensor | None:
        """Which tokens of ``width`` groups are attended to; None where only the end of the last group is left out."""
        if valid is None and step.same_offset:
            return None
        tokens = step.token_mask(valid, width, self.state.window.group_tokens)
        return torch.from_numpy(tokens)[:, None, None].to(self.state.shape.device)

    def _wait_for_abandoned(self) -> None:
        """Wait for the reads of a step that broke off: they must not arrive in memory that is used again."""
        while self._fetches:
            _, fetch = self._fetches.popitem()  # a ticket is waited for once, also where its reads fail
            if fetch.ticket is not None:
                with contextlib.suppress(DiskError):
                    self.state.store.backend.wait(fetch.ticket)


def _best_groups(scores: torch.Tensor, first: int, ends: IntArray, count: int) -> tuple[IntArray, bool]:
    """``top_groups`` for NumPy, and whether a score is not a number: NaN compares with nothing, so nothing is best."""
    unusable = scores[:, first : int(max(ends))].sum().isnan()
    if scores.device.type == "cpu":
        return (
            (np.zeros((0, 0), np.int64), True) if unusable else (top_groups(scores, first, ends, count).numpy(), False)
        )
    groups = top_groups(scores, first, ends, count)
    both = torch.cat((groups.flatten(), unusable.view(1).to(groups.dtype))).cpu().numpy()  # one wait for the device
    return both[:-1].reshape(groups.shape), bool(both[-1])


def real_entries(groups: IntArray, step: Step) -> BoolArray | None:
    """Which of the chosen groups ``[B, n]`` are real, None: all."""
    if step.fewest_candidates >= groups.shape[1]:  # every sequence has as many
        return None
    valid: BoolArray = groups < step.ends[:, None]
    return None if valid.all() else valid
