"""Compiled loops over slots against their twins in NumPy and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvswap.core.attention import TiledAttention
from kvswap.memory.lookup import Found, _find, find
from kvswap.memory.slots import SlotPool
from kvswap.native import array_loops, loops
from kvswap.selection.window import Window
from kvswap.store import read_plan as extents
from kvswap.store.layout import GroupLayout
from kvswap.terms import KVGeometry

pytestmark = pytest.mark.skipif(not array_loops.available(), reason="no compiled loops: there was no C compiler")

SHAPE = (2, 3, 4, 8)
SPECIAL = [0.0, -0.0, 1e-8, 2.0**-25, 2.0**-24 * 1.5, 2.0**-24 * 2.5, 6.1e-5, 6.103515625e-05, 1.0, 65503.9, 65519.9]
SPECIAL += [65520.0, 1e30, float("inf"), float("-inf"), float("nan"), 1 + 2.0**-11, 1 + 3 * 2.0**-11, -3.14159]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def gathered(slots: torch.Tensor, index: list[int], shape: tuple[int, int, int, int] = SHAPE) -> torch.Tensor:
    return loops.gather(slots, np.array(index, np.int64)[None], shape)[:, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_stored_value_becomes_the_same_float(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    slots = every.view(32, 2048)
    found = gathered(slots, list(range(32)), (2, 4, 4, 64))
    groups = slots.float().view(32, 2, 4, 256)
    for n in range(32):
        piece = found.view(2, 4, 32, 256)[:, :, n]
        assert torch.equal(piece.isnan(), groups[n].isnan())
        assert torch.equal(piece.nan_to_num(7.0), groups[n].nan_to_num(7.0))


def test_groups_are_gathered_in_the_order_asked_for() -> None:
    slots = noise(10, 2 * 3 * 4 * 8 + 16).half()  # with padding
    index = [7, 0, 0, 3]
    groups = slots[torch.tensor(index), : 2 * 3 * 4 * 8].float().view(4, 2, 3, 4, 8)
    assert torch.equal(gathered(slots, index), groups.permute(1, 2, 0, 3, 4).reshape(2, 3, 16, 8))
    assert gathered(slots, []).shape == (2, 3, 0, 8)
    for beyond in (10, -1):
        with pytest.raises(ValueError, match="a slot that is not among the"):
            gathered(slots, [0, beyond])


@pytest.mark.parametrize("grain", [1, 1 << 30])
@pytest.mark.parametrize("shape", [(2, 3, 4, 64), (2, 2, 1, 20), (2, 1, 64, 24), (2, 2, 7, 33)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_to_groups_as_they_are_stored(dtype, shape, grain, monkeypatch) -> None:
    """Tile by tile, from a beginning that was made in another way, with large logits: as near to float64 as torch."""
    monkeypatch.setattr(loops, "GRAIN", grain)
    _, heads, group_tokens, head_dim = shape
    slots = (3 * noise(101, 2 * heads * group_tokens * head_dim + 8)).to(dtype)
    query = 4 * noise(heads * 3, 2, head_dim)
    ours, twin = (TiledAttention(query, heads, head_dim**-0.5) for _ in range(2))
    for number, (first, stop) in enumerate(((0, 5), (5, 6), (6, 101))):
        keys, values = gathered(slots, list(range(first, stop)), shape)
        twin.add(keys, values)
        if number == 0:
            ours.add(keys, values)
        else:
            ours.add_groups(slots[first:stop], shape)
    keys, values = gathered(slots, list(range(101)), shape).double()
    logits = query.double().view(heads, 6, head_dim) @ keys.transpose(1, 2) * head_dim**-0.5
    exact = (logits.softmax(-1) @ values).view(heads * 3, 2, head_dim).transpose(0, 1)
    error, torch_error = ((each.result() - exact).abs().max() for each in (ours, twin))
    assert error < 2 * torch_error + 2e-6
    torch.testing.assert_close(ours.log_total, twin.log_total, rtol=1e-6, atol=1e-5)


def test_attention_to_groups_takes_chosen_slots_and_refuses_others() -> None:
    slots, index = noise(10, 2 * 3 * 4 * 8 + 16).half(), np.array([7, 0, 3])

    def attended(slots: torch.Tensor, index: np.ndarray | None, query: torch.Tensor) -> torch.Tensor:
        peak, total = torch.full((3, 2, 1), float("-inf")), torch.zeros(3, 2, 1)
        output = torch.zeros(3, 2, 8)
        loops.attend_groups(slots, index, SHAPE, query, peak, total, output)
        return output / total

    query = noise(3, 2, 8)
    assert torch.equal(attended(slots, index, query), attended(slots[torch.from_numpy(index)], None, query))
    slots[3, 5] = float("nan")
    assert attended(slots, index, query)[0].isnan().all() and not attended(slots, index, query)[1:].isnan().any()
    for wrong in (np.array([0, 10]), np.array([-1])):
        with pytest.raises(ValueError, match="a slot that is not among the 10"):
            attended(slots, wrong, query)
    with pytest.raises(ValueError, match="do not hold groups"):
        attended(slots[:, :100], None, query)
    with pytest.raises(ValueError, match="query"):
        attended(slots, None, query[:2])
    with pytest.raises(ValueError, match="slots"):
        attended(slots.float(), None, query)


@pytest.mark.parametrize("grain", [1, 1 << 30])
def test_a_batch_is_gathered_sequence_by_sequence(grain: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "GRAIN", grain)
    slots = noise(40, 2 * 3 * 4 * 8).half()
    index = np.random.default_rng(0).integers(0, 40, (5, 7))
    found = loops.gather(slots, index, SHAPE)
    assert found.shape == (2, 5, 3, 28, 8)
    for b, row in enumerate(index):
        assert torch.equal(found[:, b], gathered(slots, row.tolist()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tokens_are_put_as_torch_would_convert_them(dtype: torch.dtype) -> None:
    values = torch.cat((torch.tensor(SPECIAL), 10.0 ** noise(4000).mul(3) * noise(4000).sign()))
    values = values[: len(values) // 24 * 24].view(-1, 3, 1, 8)
    keys, (batch, *_) = values.flip(0), values.shape
    slots = torch.zeros(batch, 2 * 3 * 4 * 8 + 8, dtype=dtype)
    offsets = np.arange(batch, dtype=np.int64) % 4
    spaced = torch.stack((keys, keys), 2)[:, :, 0]  # heads are not neighbours
    loops.put_tokens(slots, np.arange(batch)[::-1].copy(), offsets, SHAPE, spaced, values)
    limit = 65504.0 if dtype == torch.float16 else float("inf")
    found = slots[:, : 2 * 3 * 4 * 8].view(batch, *SHAPE).flip(0)
    for part, given_ in enumerate((keys, values)):
        at_offset = found[torch.arange(batch), part, :, torch.from_numpy(offsets)]
        wanted = given_[:, :, 0].clamp(-limit, limit).to(dtype)
        assert torch.equal(at_offset.nan_to_num(7.0), wanted.nan_to_num(7.0))
        assert torch.equal(at_offset.signbit() & ~at_offset.isnan(), wanted.signbit() & ~wanted.isnan())
    assert int((slots != 0).sum()) <= 2 * values.numel()  # nothing beside them


@given(
    st.sets(st.tuples(st.integers(0, 3), st.integers(0, 60)), min_size=1, max_size=60),
    st.integers(-1, 8),
    st.integers(0, 80),
)
def test_reads_are_planned_as_by_arrays(wanted: set[tuple[int, int]], gap_groups: int, spare: int) -> None:
    files, groups = np.array(sorted(wanted), np.int64).T
    found, place = array_loops.plan_reads(files, groups, gap_groups, spare)
    plan = extents._plan_reads(files, groups, gap_groups, len(groups) + spare)
    assert found.tolist() == [each.tolist() for each in (plan.files, plan.first, plan.count, plan.staging)]
    assert place.tolist() == plan.place.tolist()


def _pool(reuse_slots: int) -> SlotPool:
    return SlotPool(
        layers=3,
        batch=2,
        layout=GroupLayout(KVGeometry(kv_heads=1, head_dim=8, group_tokens=4, itemsize_bytes=2), 512),
        window=Window(4, 1, 2, 8),
        staging_groups=32,
        reuse_slots=reuse_slots,
        capacity_groups=40,
        dtype=torch.float16,
        device=torch.device("cpu"),
    )


def _visit(pool: SlotPool, layer: int, sequences: np.ndarray, groups: np.ndarray, content: float) -> list[int]:
    found = pool.lookup(layer, sequences, groups)
    missing = found < 0
    staged = pool.staging_slot(layer % 2) + np.arange(int(missing.sum()))
    pool.groups(layer)[torch.from_numpy(staged)] = content
    pool.admit(layer, sequences[missing], groups[missing], staged)
    return found.tolist()


@pytest.mark.parametrize("reuse_slots", [5, 40, 200])
def test_slots_are_given_away_as_by_arrays(reuse_slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(reuse_slots)
    ours, twin = _pool(reuse_slots), _pool(reuse_slots)
    kept = 0
    for step in range(60):
        if step == 30:
            for each in (ours, twin):
                each.grow_table(64)
                each.shrink_reuse(reuse_slots * 3 // 4)
        for layer in range(3):
            wanted = np.sort(random.choice(80, 14, replace=False))
            sequences, groups = np.divmod(wanted, 40)
            found = _visit(ours, layer, sequences, groups, float(step))
            with monkeypatch.context() as patch:
                patch.setattr(array_loops, "available", lambda: False)
                assert _visit(twin, layer, sequences, groups, float(step)) == found
            kept += sum(slot >= 0 for slot in found)
            for name in ("table", "owner", "worth", "seen"):
                assert np.array_equal(getattr(ours, name), getattr(twin, name)), (step, layer, name)
            assert torch.equal(ours.groups(layer)[ours.reuse_start :], twin.groups(layer)[twin.reuse_start :])
    assert kept > 30  # there was something to find


@given(st.data())
def test_groups_are_found_as_by_arrays(data: st.DataObject) -> None:
    ours, twin = _pool(20), _pool(20)
    assert ours.compiled_lookup  # or both would be the twin
    for step in range(data.draw(st.integers(1, 6))):
        counts = st.lists(st.sets(st.integers(0, 39), min_size=6, max_size=6), min_size=2, max_size=2)
        groups = np.array([sorted(each) for each in data.draw(counts)], np.int64)
        ends = np.array(data.draw(st.lists(st.integers(0, 40), min_size=2, max_size=2)), np.int64)
        layer, gap = data.draw(st.integers(0, 2)), data.draw(st.integers(-1, 4))
        found = find(ours, layer, groups, ends, gap_groups=gap, half=step % 2)
        wanted = _find(twin, layer, groups, ends, gap, step % 2)
        shift = twin.staging_address(0) - ours.staging_address(0)
        for name, one, other in zip(Found._fields, found, wanted, strict=True):
            assert np.array_equal(one + shift if name == "addresses" else one, other), name
        for pool, each in ((ours, found), (twin, wanted)):
            pool.admit(layer, each.sequences, each.groups, each.staged)
        for name in ("table", "owner", "worth", "seen"):
            assert np.array_equal(getattr(ours, name), getattr(twin, name)), name


def test_groups_that_cannot_be_found_or_land_are_refused_untouched() -> None:
    pool, groups, ends = _pool(8), np.arange(80).reshape(2, 40) % 40, np.full(2, 40)
    before = pool.worth.copy(), pool.arrays.arrays[4].copy()
    for wrong in (
        {"groups": groups},  # 80 groups, of which 32 can land
        {"groups": groups[:, :4] - 1},
        {"groups": groups[:, :4], "ends": ends + 1},
        {"groups": groups[:, :4], "ends": ends - 41},
        {"groups": groups[:, :4], "layer": -1},
    ):
        with pytest.raises(ValueError, match="does not have"):
            find(pool, **{"layer": 1, "ends": ends, **wrong}, gap_groups=0, half=0)  # type: ignore[arg-type]
    assert np.array_equal(pool.worth, before[0]) and np.array_equal(pool.arrays.arrays[4], before[1])


def test_what_lies_outside_is_refused_before_anything_is_touched() -> None:
    pool, layer, one = _pool(8), 1, np.ones(1, np.int64)
    before = pool.table.copy(), pool.worth.copy(), pool.groups(layer).clone()
    for sequences, groups in ((0 * one, 40 * one), (0 * one, -one), (8 * one, one), (-9 * one, one)):
        with pytest.raises(ValueError, match="does not have"):
            pool.lookup(layer, sequences, groups)
    for groups, staged in ((300 * one, 60 * one), (one, 5000 * one), (one, pool.reuse_start * one), (one, -one)):
        with pytest.raises(ValueError, match="does not have"):
            pool.admit(layer, 0 * one, groups, staged)
    token = torch.ones(1, 1, 1, 8)
    for home, offset in ((5000 * one, one), (-one, one), (one, 4 * one)):
        with pytest.raises(ValueError, match="a slot that is not among the"):
            pool.put_token(layer, home, offset, token, token)
    for old, new in zip(before, (pool.table, pool.worth, pool.groups(layer)), strict=True):
        assert np.array_equal(old, new)
