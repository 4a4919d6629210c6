"""Path two: one token goes through the layers while the groups it needs come from disk.

Entering the layer before an offloaded one, ``prefetch`` predicts which groups that layer will attend to and starts
the reads; the layer before computes meanwhile; ``attend`` waits, gathers sinks, selected groups, recent window and
rolling tail in the order of positions, and hands K, V to the model's own attention. Nothing here loops over groups or
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kvswap.core.state import BatchState
from kvswap.lab.rivals.head_votes import groups_of_heads
from kvswap.memory.lookup import Found, find
from kvswap.selection.mass import top_groups
from kvswap.terms import BoolArray, IntArray


@dataclass(frozen=True, slots=True)
class Step:
    """What is the same for all layers of one step. Places are counted from a layer's first pinned slot."""

    current: IntArray  # [B] group of the newest token
    offset: IntArray  # [B] its place in that group
    ends: IntArray  # [B] end of the groups to select from
    candidates: int  # most groups that a sequence can select from
    fewest: int  # of the sequence that has fewest
    tail: IntArray  # [B] place of the newest group
    sinks: IntArray  # [B, <= S]
    ring: IntArray  # [B, <= ring]
    sinks_valid: BoolArray
    ring_valid: BoolArray
    begun: list[int]  # sequences whose newest token begins a group
    full: bool  # whether all sinks and all of the ring are there
    even: bool  # whether the newest group has as many tokens in every sequence


class Fetch(NamedTuple):
    """Groups of one layer on their way, in staging half ``half``.

    ``groups`` ``[B, n]`` are their numbers in order of position, ``valid`` where there is one, None: all; ``votes``
    ``[B, H_kv, n]`` tells which heads attend to which, None: all.
    """

    ticket: int
    half: int
    found: Found
    groups: IntArray
    valid: BoolArray | None
    votes: BoolArray | None

    @property
    def chosen(self) -> IntArray:
        """Numbers of the groups, ``[B, n]``; 0 where there is none."""
        return self.groups if self.valid is None else np.where(self.valid, self.groups, 0)


class Decode:
    """Decode steps over one state. One step at a time; layers in order."""

    def __init__(self, state: BatchState) -> None:
        self.state = state
        self._bases = [
            np.array([state.pool.home_base(layer, b) for b in range(state.batch)], np.int64)
            for layer in range(state.shape.layers)
        ]
        self._fetches: dict[int, Fetch] = {}
        self.latest: dict[int, Fetch] = {}  # what each layer attended to in its last step
        self._half = 0
        self._gap_groups, self._skip_bytes = state.config.read_gap_bytes // state.layout.slot_bytes, 0
        if state.method.rebuilds_keys:  # V alone is read, group by group, from the last aligned place before it
            alignment_bytes = state.layout.alignment_bytes
            self._gap_groups = -1
            self._skip_bytes = state.layout.geometry.group_bytes // 2 // alignment_bytes * alignment_bytes
        self.step: Step | None = None

    def begin_step(self) -> None:
        """Start a step: one more token for every sequence."""
        state, window = self.state, self.state.window
        tokens = state.tokens + 1
        state.ensure_capacity(int(tokens.max()))
        self._abandon()
        current, offset = np.divmod(tokens - 1, window.group_tokens)
        ring_start = np.maximum(window.sink_groups, current - window.recent_groups)
        sinks = np.broadcast_to(np.arange(window.sink_groups), (state.batch, window.sink_groups))
        ring = current[:, None] + np.arange(-window.recent_groups, 1)
        sinks_valid, ring_valid = sinks <= current[:, None], ring >= ring_start[:, None]
        self.step = Step(
            current=current,
            offset=offset,
            ends=ring_start,
            candidates=int(ring_start.max()) - window.sink_groups,
            fewest=int(ring_start.min()) - window.sink_groups,
            tail=window.home(current),
            sinks=sinks,
            ring=window.home(ring),
            sinks_valid=sinks_valid,
            ring_valid=ring_valid,
            begun=np.flatnonzero(offset == 0).tolist(),
            full=bool(sinks_valid.all() and ring_valid.all()),
            even=bool((offset == offset[0]).all()),
        )

    def end_step(self) -> None:
        """All layers are through."""
        self.state.tokens += 1
        self.state.trace.decode_steps += 1
        self.step = None

    def selects_all(self, layer: int) -> bool:
        """Whether every candidate fits the selection of this layer, so that nothing needs to be predicted."""
        assert self.step is not None
        return self.step.candidates <= self.state.select_groups[layer]

    def prefetch(self, layer: int, query: torch.Tensor | None) -> None:
        """Choose the groups of ``layer`` and start reading those that are not in memory.

        ``query`` ``[B, H_q, d]`` is predicted, or the true one; it may be None when ``selects_all``.
        """
        state, step = self.state, self.step
        assert step is not None
        state.trace.lap()
        groups, valid, votes = self._choose(layer, query, step)
        state.trace.lap("predict_s")
        half, self._half = self._half, 1 - self._half
        found = find(state.pool, layer, groups, step.ends, gap_groups=self._gap_groups, half=half)
        state.trace.lap("slots_s")
        ticket = state.store.submit(found.rows, found.first, found.counts, found.addresses, self._skip_bytes)
        state.trace.lap("submit_s")
        self._fetches[layer] = Fetch(ticket, half, found, groups, valid, votes)
        state.trace.selected_groups += found.wanted
        state.trace.reused_groups += found.wanted - len(found.staged)
        state.trace.lap("slots_s")

    def started(self, layer: int) -> bool:
        """Whether ``prefetch`` of this layer was called in this step."""
        return layer in self._fetches

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take the newest token's K, V ``[B, H_kv, 1, d]`` into the rolling tail."""
        state, step = self.state, self.step
        assert step is not None
        state.trace.lap()
        self._flush(layer, step)
        state.pool.put_token(layer, self._bases[layer] + step.tail, step.offset, keys, values)
        state.trace.lap("slots_s")

    def attend(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Wait for the reads of ``layer``; returns K, V ``[B, H_kv, S, d]`` in order of position, and a mask.

        The mask is boolean ``[B, 1 or H_q, 1, S]``, or None where all heads of all sequences attend to all of it.
        """
        state, step = self.state, self.step
        assert step is not None
        fetch = self.latest[layer] = self._fetches.pop(layer)
        state.store.backend.wait(fetch.ticket)
        state.trace.lap()
        found = fetch.found
        if state.store.sealed:
            rows = layer * state.batch + found.sequences
            state.store.unseal(rows, found.groups, *state.pool.landed(fetch.half, found.staged))
        state.pool.land(fetch.half, found.landed)
        slots, valid = self._slots(layer, fetch, step)
        kv = state.pool.gather(layer, slots, state.shape.dtype)
        if state.method.rebuilds_keys and fetch.groups.size:
            keys = state.sketches[layer].keys(torch.from_numpy(fetch.chosen))  # type: ignore[attr-defined]
            start = int(step.sinks_valid[0].sum()) * state.window.group_tokens
            kv[0, :, :, start : start + keys.shape[2]] = keys
        mask = self._mask(valid, slots.shape[1], step, fetch.votes)
        if mask is None:
            kv = kv[:, :, :, : kv.shape[3] - state.window.group_tokens + int(step.offset[0]) + 1]
        state.pool.admit(layer, found.sequences, found.groups, found.staged)
        state.trace.lap("slots_s")
        return kv[0], kv[1], mask

    def _slots(self, layer: int, fetch: Fetch, step: Step) -> tuple[IntArray, BoolArray | None]:
        """All slots to attend to, ``[B, W]`` in order of position, and which entries are real, None: all."""
        base = self._bases[layer][:, None]
        slots = np.concatenate((base + step.sinks, fetch.found.slots, base + step.ring), axis=1)
        if fetch.valid is None and step.full:
            return slots, None
        chosen = np.ones(fetch.groups.shape, np.bool_) if fetch.valid is None else fetch.valid
        valid = np.concatenate((step.sinks_valid, chosen, step.ring_valid), axis=1)
        if self.state.batch == 1:
            return slots[valid][None], None
        return np.where(valid, slots, base), None if valid.all() else valid

    def _choose(
        self, layer: int, query: torch.Tensor | None, step: Step
    ) -> tuple[IntArray, BoolArray | None, BoolArray | None]:
        """Groups to attend to, ``[B, n]`` ascending, which entries are real (None: all), and which heads want them."""
        state, first = self.state, self.state.window.sink_groups
        votes = None
        if self.selects_all(layer):
            groups = np.tile(np.arange(first, first + step.candidates), (state.batch, 1))
        elif state.select_groups[layer] == 0:
            groups = np.zeros((state.batch, 0), np.int64)
        else:
            assert query is not None
            scores = state.method.score(state.sketches[layer], query, state.shape.scaling, state.window.group_tokens)
            if state.method.per_head:
                groups, votes = groups_of_heads(scores, first, step.ends, state.select_groups[layer])
            else:
                groups = top_groups(scores, first, step.ends, state.select_groups[layer]).cpu().numpy()
        if votes is None and step.fewest >= groups.shape[1]:  # every sequence has as many
            return groups, None, votes
        valid = groups < step.ends[:, None]
        return groups, None if valid.all() else valid, votes

    def _mask(self, valid: BoolArray | None, width: int, step: Step, votes: BoolArray | None) -> torch.Tensor | None:
        """Which tokens of ``width`` groups are attended to; None where only the last group's end is left out."""
        state, group_tokens = self.state, self.state.window.group_tokens
        if valid is None and step.even and votes is None:
            return None
        groups = np.ones((state.batch, width), np.bool_) if valid is None else valid
        if votes is not None:
            heads = np.repeat(groups[:, None], votes.shape[1], axis=1)
            start = int(step.sinks_valid[0].sum())
            heads[:, :, start : start + votes.shape[2]] &= votes
            tokens = np.repeat(heads, group_tokens, axis=2)
            tokens[:, :, -group_tokens:] &= np.arange(group_tokens) <= step.offset[:, None, None]
            by_query = np.repeat(tokens, state.shape.query_heads // votes.shape[1], axis=1)
            return torch.from_numpy(by_query)[:, :, None].to(state.shape.device)
        tokens = np.repeat(groups, group_tokens, axis=1)
        tokens[:, -group_tokens:] &= np.arange(group_tokens) <= step.offset[:, None]
        return torch.from_numpy(tokens)[:, None, None].to(state.shape.device)

    def _flush(self, layer: int, step: Step) -> None:
        """Write and sketch the whole groups that wait in the ring, some at a time; layers take turns."""
        state, window = self.state, self.state.window
        for sequence in step.begun:
            first, current = int(state.flushed[layer, sequence]), int(step.current[sequence])
            if first < current and (current + layer) % window.flush_groups == 0:
                keys, values = state.pool.read_home(layer, sequence, first, current - first)
                state.append(layer, sequence, keys, values)

    def _abandon(self) -> None:
        """Reads of a step that broke off must not land in memory that is used again."""
        for fetch in self._fetches.values():
            self.state.store.backend.wait(fetch.ticket)
        self._fetches.clear()
