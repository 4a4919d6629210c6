"""Everything of one batch that lives between calls: lengths, store, slots and sketches, under one memory ledger.

``open_state`` divides the memory limit before anything is allocated, and refuses a limit that cannot work. One thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.config import Config
from kvswap.core.cache_stats import Trace
from kvswap.disk.backend import ReadBackend
from kvswap.errors import DamagedError
from kvswap.memory.budget import OWNER_BYTES, MemoryNeeds, capacity_for, grown
from kvswap.memory.ledger import Ledger
from kvswap.memory.slots import SlotPool
from kvswap.native.arrays import IntArray
from kvswap.selection.method import Method, Sketch, SketchMaker
from kvswap.selection.sketch import LayerSketch
from kvswap.selection.tally import Tally
from kvswap.selection.window import Step, Window
from kvswap.store.groups import GroupStore
from kvswap.store.layout import GroupLayout
from kvswap.store.persistent import PersistentFiles, PersistentGroupStore
from kvswap.terms import KVGeometry, ceil_div


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a batch state is built for: the model's side of it."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    dtype: torch.dtype
    store_dtype: torch.dtype
    device: torch.device


@dataclass(slots=True, kw_only=True)
class BatchState:
    """State of B sequences over all offloaded layers; layers are counted by ``order``.

    ``tokens[b]`` tokens are stored of sequence b, padding excluded; groups ``[0, flushed[layer, b])`` are on disk (or
    queued) and sketched, later ones are in pinned slots alone. ``select_groups[layer]`` groups are chosen in each step;
    ``selected`` is the most that staging and scratch have room for.
    """

    config: Config
    method: Method
    shape: Shape
    window: Window
    layout: GroupLayout
    needs: MemoryNeeds
    ledger: Ledger
    trace: Trace
    store: GroupStore
    pool: SlotPool
    sketches: list[Sketch]
    tally: Tally
    select_groups: list[int]
    selected: int
    tokens: NDArray[np.int64]
    flushed: NDArray[np.int64]
    capacity_tokens: int

    @property
    def batch(self) -> int:
        """B."""
        return len(self.tokens)

    @property
    def attended_tokens(self) -> int:
        """M of the layer that attends to most, as it is now."""
        window = self.window
        return (max(self.select_groups) + window.sink_groups + window.recent_groups) * window.group_tokens

    def ensure_capacity(self, tokens: int) -> None:
        """Make room for sequences of ``tokens``, and for what is selected of them, giving up reuse slots for it.

        With some headroom, or without where the limit leaves none. No read may be in flight. Raises MemoryBudgetError.
        """
        selected = self._select(tokens)
        if tokens <= self.capacity_tokens and selected == self.selected:
            return
        if self.config.kv_memory == "auto":  # a share of the context, which has grown
            self.ledger.limit_bytes = max(self.ledger.limit_bytes, self.needs.auto_limit_bytes(grown(tokens)))
        before, slot_bytes = self.needs.parts(self.capacity_tokens, self.selected), self.layout.slot_bytes + OWNER_BYTES
        wider = self.pool.missing_slots(self.needs.staging_groups(selected))
        capacities = (capacity_for(tokens), grown(tokens)) if tokens > self.capacity_tokens else (self.capacity_tokens,)
        for capacity in capacities:
            growth = {part: size - before[part] for part, size in self.needs.parts(capacity, selected).items()}
            drop = max(0, wider, ceil_div(sum(growth.values()) - self.ledger.free_bytes, slot_bytes))
            if drop <= self.pool.reuse_slots:
                break
        else:
            raise self.needs.too_little(self.ledger.limit_bytes, tokens, growing=True)
        if drop:
            self.pool.shrink_reuse(self.pool.reuse_slots - drop)
            self.ledger.release("slots", drop * self.layout.slot_bytes)
            self.ledger.release("tables", drop * OWNER_BYTES)
        for part, size in growth.items():
            self.ledger.release(part, max(0, -size))
        self.ledger.reserve_all({part: max(0, size) for part, size in growth.items()})
        self.pool.grow_table(ceil_div(capacity, self.window.group_tokens))
        self.tally.grow(ceil_div(capacity, self.window.group_tokens))
        self.pool.resize_staging(self.needs.staging_groups(selected))
        self.capacity_tokens = capacity
        if selected != self.selected:
            self.selected, self.select_groups = selected, [selected] * self.shape.layers
        if not drop:
            self._grow_reuse()

    def _select(self, tokens: int) -> int:
        """Groups to select from a context of ``tokens``: by its length and the limit, never by what happened before."""
        if not self.window.share:
            return self.selected
        automatic = self.config.kv_memory == "auto"
        limit_bytes = self.needs.auto_limit_bytes(grown(tokens)) if automatic else self.ledger.limit_bytes
        return self.needs.select_groups(tokens, limit_bytes)

    def _grow_reuse(self) -> None:
        """Let reuse take what is left of the limit, as long as there are groups for it."""
        pool = self.pool
        free_bytes = self.ledger.free_bytes + pool.reuse_slots * (self.layout.slot_bytes + OWNER_BYTES)
        wanted = min(self.needs.reuse_slots(self.capacity_tokens, free_bytes), pool.most_reuse_slots)
        more = wanted - pool.reuse_slots
        if more > 0 and pool.keeps_written:
            self.ledger.reserve_all({"slots": more * self.layout.slot_bytes, "tables": more * OWNER_BYTES})
            pool.grow_reuse(wanted)

    def append(self, layer: int, sequence: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store, sketch and pin tokens from group ``flushed[layer, sequence]`` on: K, V ``[H_kv, n, d]``.

        Whole groups go to disk and into the sketch; the newest ones and an incomplete last one are pinned.
        """
        first, group_tokens = int(self.flushed[layer, sequence]), self.window.group_tokens
        whole = keys.shape[1] // group_tokens
        if whole:
            cut = slice(0, whole * group_tokens)
            self.store.append(layer, sequence, first, keys[:, cut], values[:, cut], self.pool.dtypes[layer])
            self.sketches[layer].append(sequence, keys[:, cut])
            self.flushed[layer, sequence] = first + whole

    def pin(self, layer: int, sequence: int, keys: torch.Tensor, values: torch.Tensor, first: int) -> None:
        """Put the groups that stay pinned into their slots: K, V ``[H_kv, n, d]`` begin at group ``first``.

        Raises DamagedError for values that are not finite, as ``flush_ring`` does.
        """
        check_finite(layer, keys, values)
        group_tokens, sinks = self.window.group_tokens, self.window.sink_groups
        last = first + ceil_div(keys.shape[1], group_tokens)
        spans = ((first, min(sinks, last)), (max(first, self.window.ring_start(last - 1)), last))
        for low, high in spans:
            if low < high:
                cut = slice((low - first) * group_tokens, (high - first) * group_tokens)
                self.pool.put_groups(layer, sequence, low, keys[:, cut], values[:, cut])

    def truncate(self, tokens: IntArray) -> None:
        """Go back to when each sequence had ``tokens`` ``[B]``, at least one: the groups after them are forgotten.

        The rolling tail and the recent window of that time come from disk, where they are no longer in memory.
        """
        window = self.window
        for layer, sketch in enumerate(self.sketches):
            assert isinstance(sketch, LayerSketch)  # KVSwapCache.can_truncate
            for sequence, count in enumerate(tokens.tolist()):
                before, whole = int(self.flushed[layer, sequence]), count // window.group_tokens
                current = (count - 1) // window.group_tokens
                self.read_back(layer, sequence, window.ring_start(current), min(current + 1, before))
                kept = self.flushed[layer, sequence] = min(before, whole)
                sketch.truncate(sequence, kept * window.group_tokens)
                self.pool.forget(layer, sequence, kept)
        self.tokens[:] = tokens

    def read_back(self, layer: int, sequence: int, first: int, end: int) -> None:
        """Put groups ``[first, end)``, which are on disk and belong into pinned slots, there."""
        if first >= end:
            return
        reader = self.store.read_tiles(layer, sequence, end, end - first, self.pool.dtypes[layer], first=first)
        try:
            for keys, values in reader:
                self.pool.put_groups(layer, sequence, first, keys, values)
        finally:
            reader.close()

    def resident(self, layer: int, sequence: int, tokens: int) -> IntArray | None:
        """Slots of all groups that are on disk, where all of them are in memory too, else None.

        ``tokens`` are stored of the sequence, with the newest one of a running step.
        """
        newest, window = max(tokens, int(self.tokens[sequence])) - 1, self.window
        numbers = np.arange(int(self.flushed[layer, sequence]))
        slots = self.pool.table[layer * self.batch + sequence, : len(numbers)].astype(np.int64)
        pinned = (numbers < window.sink_groups) | (numbers >= window.ring_start(newest // window.group_tokens))
        slots[pinned] = self.pool.first_pinned_slot(layer, sequence) + window.pinned_slot(numbers[pinned])
        return None if (slots < 0).any() else slots

    def flush_ring(self, layer: int, step: Step) -> None:
        """Write and sketch the whole groups that wait in the ring, several at a time; layers take turns."""
        for sequence in step.new_group:
            first, current = int(self.flushed[layer, sequence]), int(step.current[sequence])
            if first < current and (current + layer) % self.window.flush_groups == 0:
                keys, values = self.pool.read_pinned(layer, sequence, first, current - first)
                check_finite(layer, keys, values)
                self.append(layer, sequence, keys, values)
                self.pool.keep(layer, sequence, first, keys, values, most=self.pool.free_slots)

    def close(self) -> None:
        """Drop files and memory."""
        try:
            self.store.close()
        finally:
            self.pool.close()
            self.sketches.clear()


def check_finite(layer: int, *tensors: torch.Tensor) -> None:
    """Raise DamagedError for keys or values that are not finite: stored once, they would be in every later answer."""
    for each in tensors:
        low, high = torch.aminmax(each)
        if not math.isfinite(float(low) + float(high)):
            raise not_finite(layer, "keys or values are not finite, so they are not stored")


def not_finite(layer: int, what: str) -> DamagedError:
    """The error for a layer whose numbers are infinite or undefined."""
    return DamagedError(
        f"layer {layer}: {what}",
        hint="check the model in its own dtype, or store_dtype, and begin the context anew",
    )


def open_state(
    config: Config,
    method: Method,
    shape: Shape,
    backend: ReadBackend,
    makers: Sequence[SketchMaker],
    *,
    batch: int,
    tokens: int,
    trace: Trace,
    check_space: Callable[[int], None],
    files: PersistentFiles | None = None,
    alignment_bytes: int = 0,
    answer_tokens: int = 0,
    share: int = 0,
) -> BatchState:
    """Divide the memory limit for ``batch`` sequences of ``tokens``, then allocate.

    An answer of ``answer_tokens`` has to fit as well; room for it is made when it comes. ``check_space`` is called with
    the bytes that will be written, and raises where the disk lacks them. ``files`` are those of a session, whose groups
    are laid out for ``alignment_bytes``. A selection that grows is one token in ``share``. Raises MemoryBudgetError.
    """
    seal_bytes, stored = (files.seals.itemsize, int(files.stored_groups.min())) if files is not None else (0, 0)
    aligned_bytes = alignment_bytes or backend.alignment_bytes
    needs, layout = _needs(config, method, shape, aligned_bytes, makers, batch, seal_bytes, share)
    pool_type, window = method.slots or SlotPool, needs.window
    ledger, reuse, selected = _divide(config, needs, pool_type, tokens, answer_tokens)
    groups = ceil_div(capacity := capacity_for(tokens), window.group_tokens)
    check_space(layout.file_bytes(shape.layers * batch, groups - stored, layout.stripe_groups(groups - stored)))
    size: dict[str, Any] = {"layers": shape.layers, "batch": batch, "layout": layout}
    pool = pool_type(
        window=window,
        staging_groups=needs.staging_groups(selected),
        reuse_slots=reuse,
        most_reuse_slots=ledger.limit_bytes // layout.slot_bytes,
        capacity_groups=groups,
        dtype=shape.store_dtype,
        device=shape.device,
        **size,
    )
    size |= {"backend": backend, "queue_bytes": needs.write_queue_bytes, "groups": groups}
    return BatchState(
        config=config,
        method=method,
        shape=shape,
        window=window,
        layout=layout,
        needs=needs,
        ledger=ledger,
        trace=trace,
        store=GroupStore(**size) if files is None else PersistentGroupStore(files, **size),
        pool=pool,
        select_groups=_select_groups(config, selected, shape.layers),
        selected=selected,
        sketches=[maker.make(batch, capacity) for maker in makers],
        tally=Tally(batch, groups, window.group_tokens, shape.device),
        tokens=np.zeros(batch, np.int64),
        flushed=np.zeros((shape.layers, batch), np.int64),
        capacity_tokens=capacity,
    )


def _divide(
    config: Config, needs: MemoryNeeds, pool_type: type[SlotPool], tokens: int, answer_tokens: int
) -> tuple[Ledger, int, int]:
    """The account of the memory limit, with everything reserved; the reuse slots that it pays for; groups to select."""
    ledger = Ledger(needs.limit_bytes(config.kv_memory, tokens))
    if config.kv_memory != "auto":
        needs.check_answer(ledger.limit_bytes, tokens, answer_tokens)
    capacity = capacity_for(tokens)
    selected = needs.select_groups(tokens, ledger.limit_bytes)
    ledger.reserve_all(needs.parts(capacity, selected))
    affordable = needs.reuse_slots(capacity, ledger.free_bytes)
    reuse = pool_type.reuse_slots_for(affordable, needs.window, needs.sequences)
    ledger.reserve_all({"tables": reuse * OWNER_BYTES, "slots": reuse * needs.slot_bytes})
    return ledger, reuse, selected


def _needs(
    config: Config,
    method: Method,
    shape: Shape,
    alignment_bytes: int,
    makers: Sequence[SketchMaker],
    batch: int,
    seal_bytes: int,
    share: int,
) -> tuple[MemoryNeeds, GroupLayout]:
    itemsize, window = shape.store_dtype.itemsize, method.window(config, shape.kv_heads)
    if window.share and share:
        window = replace(window, share=share)
    geometry = KVGeometry(
        kv_heads=shape.kv_heads, head_dim=shape.head_dim, group_tokens=config.group_tokens, itemsize_bytes=itemsize
    )
    layout = GroupLayout(geometry, max(alignment_bytes, itemsize))
    needs = MemoryNeeds(
        layers=shape.layers,
        batch=batch,
        scoring_token_bytes=makers[0].scratch_token_bytes,
        window=window,
        slot_bytes=layout.slot_bytes,
        token_bytes=geometry.token_bytes,
        compute_itemsize_bytes=shape.dtype.itemsize,
        store_itemsize_bytes=itemsize,
        sketch_token_bytes=makers[0].token_bytes,
        basis_bytes=sum(maker.basis_bytes + batch * maker.sequence_bytes for maker in makers),
        extra_scratch_bytes=method.extra_scratch_bytes(config.group_tokens, layout.slot_bytes),
        seal_group_bytes=seal_bytes,
    )
    return needs, layout


def _select_groups(config: Config, most: int, layers: int) -> list[int]:
    """Groups that each layer selects: ``most``, or less where layers have budgets of their own."""
    if config.layer_select_tokens is None:
        return [most] * layers
    return [min(count, most) for count in config.layer_select_groups(layers)]
