"""Slots that groups compete for: what is found is what was put there, and nothing in use is given away."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvswap.lab.rivals.parts.slots import PreviousSlots
from kvswap.memory.budget import OWNER_BYTES
from kvswap.memory.slots import SlotPool
from kvswap.selection.window import Window
from kvswap.store.layout import GroupLayout
from kvswap.terms import KVGeometry

LAYERS, GROUPS = 3, 64
KINDS = (SlotPool, PreviousSlots)


def pool(kind: type[SlotPool] = SlotPool, reuse_slots: int = 12) -> SlotPool:
    geometry = KVGeometry(kv_heads=1, head_dim=8, group_tokens=4, itemsize_bytes=2)
    return kind(
        layers=LAYERS,
        batch=1,
        layout=GroupLayout(geometry, 512),
        window=Window(4, 1, 2, 8),
        staging_groups=16,
        reuse_slots=reuse_slots,
        capacity_groups=GROUPS,
        dtype=torch.float16,
        device=torch.device("cpu"),
    )


def visit(slots: SlotPool, layer: int, groups: list[int]) -> list[int]:
    """Look groups up, read those that are missing (each is full of its own number), keep them; what was found."""
    wanted = np.array(groups, np.int64)
    found = slots.lookup(layer, np.zeros_like(wanted), wanted)
    missing = wanted[found < 0]
    staged = slots.staging_slot(0) + np.arange(len(missing))
    for slot, group in zip(staged, missing, strict=True):
        slots.groups(layer)[int(slot)] = float(layer * GROUPS + group)
    slots.admit(layer, np.zeros_like(missing), missing, staged)
    return wanted[found >= 0].tolist()


def holds(slots: SlotPool, layer: int, group: int) -> bool:
    """Whether a group is in a slot; if it is, its content must be its own."""
    slot = int(slots.table[layer, group])
    if slot >= 0:
        assert bool((slots.groups(layer)[slot] == float(layer * GROUPS + group)).all())
        assert slots.owner[slot - slots.reuse_start] == layer * GROUPS + group
    return slot >= 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_found_is_what_was_put_there(kind) -> None:
    slots, random = pool(kind), np.random.default_rng(0)
    for _ in range(60):
        for layer in range(LAYERS):
            visit(slots, layer, sorted(random.choice(20, 6, replace=False).tolist()))
            held = [(n, group) for n in range(LAYERS) for group in range(GROUPS) if holds(slots, n, group)]
            assert len(held) <= slots.reuse_slots
            assert len({int(slots.table[place]) for place in held}) == len(held)  # one slot, one group
            assert len(held) == int((slots.owner >= 0).sum())


@pytest.mark.parametrize(("kind", "reuse_slots"), [(SlotPool, 4), (SlotPool, 6), (PreviousSlots, 12)])
def test_what_the_next_layer_has_found_is_not_given_away(kind, reuse_slots) -> None:
    slots = pool(kind, reuse_slots)
    visit(slots, 1, [1, 2, 3, 4])
    wanted = np.array([1, 2, 3, 4], np.int64)
    for round_ in range(8):  # the layer before keeps what it has read after the next one has looked
        found = slots.lookup(1, np.zeros_like(wanted), wanted)
        visit(slots, 0, list(range(10 + 4 * round_, 14 + 4 * round_)))
        for group, slot in zip(wanted, found, strict=True):
            assert slot >= 0
            assert bool((slots.groups(1)[int(slot)] == float(GROUPS + group)).all())


def test_groups_that_are_no_longer_selected_make_room() -> None:
    slots = pool(reuse_slots=4)
    assert visit(slots, 0, [1, 2, 3, 4]) == []
    assert visit(slots, 0, [1, 2, 3, 4]) == [1, 2, 3, 4]
    for _ in range(12):  # worth decays at each visit without them
        visit(slots, 0, [5, 6, 7, 8])
    assert visit(slots, 0, [5, 6, 7, 8]) == [5, 6, 7, 8]
    assert not any(holds(slots, 0, group) for group in (1, 2, 3, 4))


def test_fresh_slots_are_taken_in_order_before_any_is_taken_away() -> None:
    """Memory that was never touched costs when it first is, so it is touched piece by piece."""
    slots = pool(reuse_slots=40)
    for round_ in range(10):
        visit(slots, round_ % LAYERS, list(range(4 * round_, 4 * round_ + 4)))
        assert (slots.owner >= 0).tolist() == [True] * (4 * round_ + 4) + [False] * (36 - 4 * round_)
    visit(slots, 0, [50, 51])
    slots.shrink_reuse(30)
    visit(slots, 1, [60, 61])
    assert (slots.owner >= 0).sum() <= 30


def test_a_layer_that_is_visited_more_does_not_wear_out_the_others() -> None:
    slots = pool(reuse_slots=8)
    visit(slots, 0, [1, 2, 3, 4])
    for round_ in range(10):
        visit(slots, 1, list(range(4 * round_, 4 * round_ + 4)))
    assert visit(slots, 0, [1, 2, 3, 4]) == [1, 2, 3, 4]


def test_growing_and_shrinking_keep_what_is_left() -> None:
    slots = pool(reuse_slots=8)
    visit(slots, 2, [1, 2, 3, 4, 5, 6])
    slots.grow_table(2 * GROUPS)
    for group in range(1, 7):
        slot = int(slots.table[2, group])
        assert slot < 0 or slots.owner[slot - slots.reuse_start] == 2 * 2 * GROUPS + group
    slots.shrink_reuse(3)
    kept = [group for group in range(2 * GROUPS) if slots.table[2, group] >= 0]
    assert len(kept) <= 3 and (slots.table < slots.reuse_start + 3).all()
    assert slots.lookup(2, np.zeros(6, np.int64), np.arange(1, 7)).max() < slots.reuse_start + 3


def test_the_account_covers_what_a_slot_takes_beside_its_bytes() -> None:
    slots = pool()
    assert slots.owner.nbytes + slots.worth.nbytes + slots.seen.nbytes <= slots.reuse_slots * OWNER_BYTES
