"""Slots: all memory that holds groups through decode, in one slab, pooled over layers and sequences.

Three regions, in this order::

    pinned    sinks, ring of newest groups, rolling tail: fixed slots for every (layer, sequence)
    staging   two halves, used in turn: where reads for one layer arrive while the layer before computes
    reuse     groups of any layer and sequence that were selected lately, found through a table

On the CPU direct reads write straight into the slab. On another device the slots are in its memory: reads write into
pinned host memory, and ``publish`` copies the groups over on a side stream.

Replacement: a slot's worth is one right after its group was selected, and decays each time its own layer selects
without it. A group that was read replaces only a slot of less worth. Plain recency would fail: layers are visited in a
cycle, so the least recently used group is the one needed soonest. Worth is compared as of each layer's own last visit.
Groups that are written, or streamed for a prompt, go into slots that are still free, with worth zero: while everything
fits, nothing is read in a decode step.
Not thread-safe: one thread, the one that runs the model.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.disk.slab import Slab, move_within
from kvswap.memory.device_staging import DeviceStaging
from kvswap.native import array_loops, loops
from kvswap.native.array_loops import SlotArrays
from kvswap.native.arrays import ByteArray, IntArray
from kvswap.selection.window import Window
from kvswap.store.layout import GroupLayout

WORTH_DECAY = 0.9
SIXTEEN_BITS = (torch.float16, torch.bfloat16)  # a layer whose values overflow one of them is stored as the other
LOOK_AT = 8  # slots compared for every group that could be kept
POWERS = (WORTH_DECAY ** np.arange(256)).astype(np.float32)  # what is left after so many visits, the last for more


class SlotPool:
    """Memory for groups of ``layers`` x ``batch`` sequences.

    ``dtypes`` holds the stored dtype of each layer (of equal size) and may be changed before a layer's first use.
    ``arrays`` is what compiled loops look groups up in. ``grow_reuse`` can reach ``most_reuse_slots``: on the CPU these
    are only address space until they are used. Slots on another device do not grow.
    """

    compiled_lookup = True
    """Whether the compiled loops do what ``lookup`` does here."""
    keeps_written = True
    """Whether free slots take groups that no step has selected yet."""

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        layout: GroupLayout,
        window: Window,
        staging_groups: int,
        reuse_slots: int,
        capacity_groups: int,
        dtype: torch.dtype,
        device: torch.device,
        most_reuse_slots: int = 0,
    ) -> None:
        self.layout, self.window, self.batch, self.layers = layout, window, batch, layers
        self.dtypes = [dtype] * layers
        self.staging_groups = staging_groups
        self.staging_start = layers * batch * window.pinned_groups
        self.reuse_start = self.staging_start + 2 * staging_groups
        slots = self.reuse_start + reuse_slots
        self.host = device.type == "cpu"
        if self.host:
            most = self.reuse_start + max(reuse_slots, most_reuse_slots)
            self.slab = Slab(slots * layout.slot_bytes, most * layout.slot_bytes)
            slots = min(most, self.slab.array.nbytes // layout.slot_bytes)
            raw = torch.from_numpy(self.slab.array)[: slots * layout.slot_bytes]
            self._staging_address = self.slab.address + self.staging_start * layout.slot_bytes
        else:
            raw = torch.zeros(slots * layout.slot_bytes, dtype=torch.uint8, device=device)
            self._device_staging = DeviceStaging(device, staging_groups * layout.slot_bytes)
            self._staging_address = self._device_staging.address
        self._raw, kinds = raw, SIXTEEN_BITS if dtype in SIXTEEN_BITS else (dtype,)
        self.most_reuse_slots = slots - self.reuse_start
        self._rows = {d: raw.view(d).view(slots, layout.slot_elements) for d in kinds}
        self.table: NDArray[np.int32] = np.full((layers * batch, capacity_groups), -1, np.int32)
        self.owner: IntArray = np.full(reuse_slots, -1, np.int64)
        self.worth: NDArray[np.float32] = np.full(reuse_slots, -1, np.float32)
        self.seen: NDArray[np.int32] = np.zeros(reuse_slots, np.int32)  # visit of its layer when worth was true
        self._visits: NDArray[np.int32] = np.zeros(layers, np.int32)
        self._hand, self._used = 0, 0  # where to look next; slots that were ever given
        self.arrays = self._locate()

    # ---- shape

    @staticmethod
    def reuse_slots_for(affordable: int, window: Window, rows: int) -> int:
        """Reuse slots to allocate of those that memory pays for, for ``rows`` pairs of layer and sequence: all."""
        return affordable

    @property
    def reuse_slots(self) -> int:
        """Slots that selected groups compete for."""
        return len(self.owner)

    def grow_table(self, capacity_groups: int) -> None:
        """Make room in the table for longer sequences."""
        wider = np.full((len(self.table), capacity_groups), -1, np.int32)
        wider[:, : self.table.shape[1]] = self.table
        owned = np.flatnonzero(self.owner >= 0)
        sequence, group = np.divmod(self.owner[owned], self.table.shape[1])
        self.owner[owned] = sequence * capacity_groups + group
        self.table = wider
        self.arrays = self._locate()

    def grow_reuse(self, reuse_slots: int) -> None:
        """Add free reuse slots, up to ``most_reuse_slots``."""
        more = reuse_slots - self.reuse_slots
        self.owner = np.concatenate((self.owner, np.full(more, -1, np.int64)))
        self.worth = np.concatenate((self.worth, np.full(more, -1, np.float32)))
        self.seen = np.concatenate((self.seen, np.zeros(more, np.int32)))
        self.arrays = self._locate()
        self.slab.grow((self.reuse_start + reuse_slots) * self.layout.slot_bytes)

    def shrink_reuse(self, reuse_slots: int) -> None:
        """Give up the last reuse slots and return their memory to the system (host slots)."""
        gone = self.owner[reuse_slots:]
        self.table.reshape(-1)[gone[gone >= 0]] = -1
        self.owner, self.worth = self.owner[:reuse_slots].copy(), self.worth[:reuse_slots].copy()
        self.seen, self._hand = self.seen[:reuse_slots].copy(), 0
        self._used = min(self._used, reuse_slots)
        self.arrays = self._locate()
        if self.host:
            self.slab.shrink((self.reuse_start + reuse_slots) * self.layout.slot_bytes)

    def missing_slots(self, staging_groups: int) -> int:
        """Reuse slots that have to go before ``resize_staging``; negative where some are spare."""
        return 2 * (staging_groups - self.staging_groups) + self.reuse_slots - self.most_reuse_slots

    def resize_staging(self, staging_groups: int) -> None:
        """Have other staging halves, with the reuse slots behind them moved as they are. No read may be in flight."""
        size, shift = self.layout.slot_bytes, 2 * (staging_groups - self.staging_groups)
        before, after = self.reuse_start, self.reuse_start + shift
        if shift == 0:
            return
        if self.host and shift > 0:
            self.slab.grow(max(self.slab.nbytes, (after + self.reuse_slots) * size))
        move_within(self._raw, before * size, after * size, self._used * size)
        self.table[self.table >= 0] += shift
        self.staging_groups, self.reuse_start = staging_groups, after
        self.most_reuse_slots -= shift
        if self.host and shift < 0:
            self.slab.shrink((after + self.reuse_slots) * size)
        if not self.host:
            self._device_staging = DeviceStaging(self._raw.device, staging_groups * size)
            self._staging_address = self._device_staging.address
        self.arrays = self._locate()

    def close(self) -> None:
        """Drop all views and release the slab. May be called twice."""
        self._rows.clear()
        vars(self).pop("_raw", None)
        if self.host:
            self.slab.close()

    # ---- views

    def rows(self, layer: int) -> torch.Tensor:
        """All slots as a layer's elements with their padding, ``[slots, slot_elements]``."""
        return self._rows[self.dtypes[layer]]

    def groups(self, layer: int) -> torch.Tensor:
        """All slots as ``[slots, 2, H_kv, G, d]`` in this layer's stored dtype; a view."""
        rows = self._rows[self.dtypes[layer]]
        groups: torch.Tensor = rows[:, : self.layout.group_elements].unflatten(1, self.layout.group_shape)
        return groups

    def first_pinned_slot(self, layer: int, sequence: int) -> int:
        """First pinned slot of this layer and sequence."""
        return (layer * self.batch + sequence) * self.window.pinned_groups

    # ---- pinned

    def put_groups(self, layer: int, sequence: int, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put groups from ``first`` on into their pinned slots: K, V ``[H_kv, n, d]``; the last may be partial."""
        group_tokens, tokens = self.window.group_tokens, keys.shape[1]
        pinned = self.first_pinned_slot(layer, sequence) + self.window.pinned_slot(
            first + np.arange(-(-tokens // group_tokens), dtype=np.int64)
        )
        whole = tokens // group_tokens
        cut = slice(0, whole * group_tokens)
        self._put_whole(layer, pinned[:whole], keys[:, cut], values[:, cut])
        if whole < len(pinned):
            slot = self.groups(layer)[int(pinned[-1])]
            for part, source in enumerate((keys, values)):
                slot[part, :, : tokens - whole * group_tokens] = source[:, whole * group_tokens :].to(slot.dtype)

    def _put_whole(self, layer: int, slots: IntArray, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put whole groups into ``slots`` ``[n]``: K, V ``[H_kv, n * G, d]``."""
        groups = self.groups(layer)
        index = torch.from_numpy(slots).to(groups.device)
        for part, source in enumerate((keys, values)):
            body = source.unflatten(1, (len(slots), self.window.group_tokens)).transpose(0, 1)
            groups[:, part].index_copy_(0, index, body.to(groups))

    def put_token(
        self, layer: int, slots: IntArray, offset: IntArray, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Put every sequence's newest token: K, V ``[B, H_kv, 1, d]``, at ``offset`` of ``slots``, both ``[B]``."""
        rows = self._rows[self.dtypes[layer]]
        if loops.converts_here(rows.dtype, keys.dtype, rows.device) and keys.stride(3) == values.stride(3) == 1:
            loops.put_tokens(rows, slots, offset, self.layout.group_shape, keys, values)
            return
        kv = torch.stack((keys[:, :, 0], values[:, :, 0]), dim=1)
        if rows.dtype == torch.float16 and kv.dtype != torch.float16:
            kv = loops.within_float16(kv)
        places = torch.from_numpy(np.stack((slots, offset))).to(rows.device)
        self.groups(layer)[places[0], :, :, places[1]] = kv.to(rows.dtype)

    def read_pinned(self, layer: int, sequence: int, first: int, count: int) -> torch.Tensor:
        """Copy of ``count`` pinned groups from ``first`` on: ``[2, H_kv, count * G, d]`` in the stored dtype."""
        groups = first + np.arange(count, dtype=np.int64)
        pinned = self.first_pinned_slot(layer, sequence) + self.window.pinned_slot(groups)
        return self.gather(layer, pinned[None], self.dtypes[layer])[:, 0]

    # ---- reuse

    def forget(self, layer: int, sequence: int, first: int) -> None:
        """Free the reuse slots of groups from ``first`` on, which are going to be written anew."""
        row = self.table[layer * self.batch + sequence, first:]
        slots = row[row >= 0] - self.reuse_start
        self.owner[slots], self.worth[slots] = -1, -1
        row[:] = -1

    @property
    def free_slots(self) -> int:
        """Reuse slots that no group was ever given."""
        return self.reuse_slots - self._used

    def share(self, layer: int) -> int:
        """Free slots that this layer may fill ahead of any selection: every layer gets as many slots."""
        rows = slice(layer * self.batch, (layer + 1) * self.batch)
        held = int((self.table[rows] >= 0).sum()) if self.free_slots else 0
        return max(0, min(self.free_slots, self.reuse_slots // self.layers - held))

    def keep(
        self, layer: int, sequence: int, first: int, keys: torch.Tensor, values: torch.Tensor, *, most: int
    ) -> None:
        """Give free slots to the newest whole groups of K, V ``[H_kv, n, d]`` from group ``first`` on, to ``most``.

        Sinks need none, and neither do groups that have one.
        """
        most = min(most, self.free_slots)
        if most <= 0 or not self.keeps_written:
            return
        row, group_tokens = layer * self.batch + sequence, self.window.group_tokens
        low, high = max(first, self.window.sink_groups), first + keys.shape[1] // group_tokens
        groups = low + np.flatnonzero(self.table[row, low:high] < 0)[-most:]
        if len(groups) == 0:
            return
        taken = self._used + np.arange(len(groups))
        self._used += len(groups)
        self.owner[taken], self.worth[taken] = row * self.table.shape[1] + groups, 0
        self.seen[taken] = self._visits[layer]
        self.table[row, groups] = taken + self.reuse_start
        low, high = int(groups[0]), int(groups[-1]) + 1
        if high - low == len(groups):  # as a rule they follow each other
            cut = slice((low - first) * group_tokens, (high - first) * group_tokens)
            self._put_whole(layer, taken + self.reuse_start, keys[:, cut], values[:, cut])
            return
        tokens = ((groups - first)[:, None] * group_tokens + np.arange(group_tokens)).reshape(-1)
        index = torch.from_numpy(tokens).to(keys.device)
        self._put_whole(layer, taken + self.reuse_start, keys[:, index], values[:, index])

    def lookup(self, layer: int, sequences: IntArray, groups: IntArray) -> IntArray:
        """Slot of each group, or -1 where it must be read. Hits gain worth, the rest of the layer decays."""
        rows = layer * self.batch + sequences
        self._visits[layer] += 1
        if array_loops.available():
            visit = int(self._visits[layer])
            return array_loops.lookup(self.arrays, rows, groups, first=self.reuse_start, visit=visit)
        found = self.table[rows, groups].astype(np.int64)
        hits = found[found >= 0] - self.reuse_start
        self.worth[hits] = self._worth_now(hits) + 1
        self.seen[hits] = self._visits[layer]
        return found

    def _worth_now(self, slots: IntArray) -> NDArray[np.float32]:
        """Worth with the decay since each was last touched: one step for every visit of its own layer."""
        layers = np.maximum(self.owner[slots], 0) // (self.batch * self.table.shape[1])
        idle = self._visits[layers] - self.seen[slots]
        worth: NDArray[np.float32] = self.worth[slots] * POWERS[np.minimum(idle, len(POWERS) - 1)]
        return worth

    def admit(self, layer: int, sequences: IntArray, groups: IntArray, staged: IntArray) -> None:
        """Keep groups that were just read into slots ``staged``, where a slot of less worth can be replaced.

        Looking at all slots would cost more with every gigabyte of them, so a clock hand goes round. Slots that were
        never used come first, in order: the system clears memory when it is first touched, huge page by huge page.
        """
        room = min(len(groups), self.reuse_slots)
        if room == 0:
            return
        if self._used < self.reuse_slots:
            hand, room = self._used, min(room, self.reuse_slots - self._used)
            looked, self._used = room, hand + room
        else:
            looked, hand = min(self.reuse_slots, room * LOOK_AT + 64), self._hand
            self._hand = (hand + looked) % self.reuse_slots
        keys = self._keys(layer, sequences[:room], groups[:room])
        if self.host and array_loops.available():
            array_loops.admit(
                self.arrays,
                layer=layer,
                layer_keys=self.batch * self.table.shape[1],
                hand=hand,
                looked=looked,
                keys=keys,
                staged=staged,
                memory=self.slab.address,
                slot_bytes=self.layout.slot_bytes,
                first=self.reuse_start,
            )
            return
        candidates = (hand + np.arange(looked)) % self.reuse_slots
        worth = np.where(self.owner[candidates] < 0, -1, self._worth_now(candidates))
        least = np.sort(np.argsort(worth, kind="stable")[:room])
        victims = candidates[least[worth[least] < 1]]
        self._replace(victims, layer, keys, staged)
        self.seen[victims] = self._visits[layer]

    def _keys(self, layer: int, sequences: IntArray, groups: IntArray) -> IntArray:
        """Where in the flat table groups are found."""
        keys: IntArray = (layer * self.batch + sequences) * self.table.shape[1] + groups
        return keys

    def _replace(self, victims: IntArray, layer: int, keys: IntArray, staged: IntArray) -> None:
        """Give reuse slots ``victims`` to the first of the groups that ``keys`` find, with worth 1."""
        if (count := len(victims)) == 0:
            return
        flat, old = self.table.reshape(-1), self.owner[victims]
        flat[old[old >= 0]] = -1
        self.owner[victims], self.worth[victims] = keys[:count], 1
        target = victims + self.reuse_start
        flat[keys[:count]] = target
        rows = self._rows[self.dtypes[layer]]
        places = torch.from_numpy(np.stack((target, staged[:count]))).to(rows.device)
        rows[places[0]] = rows[places[1]]

    def _locate(self) -> SlotArrays:
        return SlotArrays(self.table, self.owner, self.worth, self.seen, self._visits, POWERS)

    # ---- staging and gathering

    def staging_address(self, half: int) -> int:
        """Host address at which staging half 0 or 1 begins."""
        return self._staging_address + half * self.staging_groups * self.layout.slot_bytes

    def staging_slot(self, half: int) -> int:
        """The first slot of staging half 0 or 1."""
        return self.staging_start + half * self.staging_groups

    def staged(self, half: int, slots: IntArray) -> tuple[ByteArray, IntArray]:
        """The memory of one staging half, uint8 ``(staging_groups, slot_bytes)``, and the rows of ``slots`` in it."""
        size, places = self.layout.slot_bytes, slots - self.staging_slot(half)
        start = half * self.staging_groups * size
        if self.host:
            start += self.staging_start * size
            memory = self.slab.array
        else:
            memory = self._device_staging.memory.numpy()
        staging: ByteArray = memory[start : start + self.staging_groups * size].reshape(-1, size)
        return staging, places

    def publish(self, half: int, count: int) -> None:
        """Copy the first ``count`` staged groups to the device; nothing to do where slots are host memory."""
        if self.host or count == 0:
            return
        size = self.layout.slot_bytes
        start = self.staging_slot(half) * size
        self._device_staging.publish(half, self._raw[start : start + count * size])

    def wait_published(self, half: int) -> None:
        """Wait until a staging half may be read into again: until what ``publish`` copies from it is copied."""
        if not self.host:
            self._device_staging.wait(half)

    def gather(self, layer: int, slots: IntArray, dtype: torch.dtype) -> torch.Tensor:
        """Copy of slots ``[B, W]`` as ``[2, B, H_kv, W * G, d]`` of ``dtype``, in the order of the slots."""
        rows = self._rows[self.dtypes[layer]]
        batch, width = slots.shape
        if loops.converts_here(rows.dtype, dtype, rows.device):
            return loops.gather(rows, slots, self.layout.group_shape)
        index = torch.from_numpy(slots.reshape(-1)).to(rows.device)
        picked = rows.index_select(0, index)[:, : self.layout.group_elements]
        kv = picked.unflatten(1, self.layout.group_shape).unflatten(0, (batch, width)).permute(2, 0, 3, 1, 4, 5)
        gathered = torch.empty(kv.shape, dtype=dtype, device=kv.device)
        gathered.copy_(kv)  # one pass: rearranges and converts
        return gathered.flatten(3, 4)
