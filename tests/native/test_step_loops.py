"""Compiled calls of a decode step: what they choose, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvswap.core.compiled_layers import describe
from kvswap.models.adapter import ModelParts, inspect
from kvswap.native import array_loops, step_loops
from kvswap.native.array_loops import SlotArrays
from kvswap.native.step_loops import Layer, Pinned, Pool, Scratch, Slots
from kvswap.selection import transform_sketch as transform
from kvswap.selection.basis import KeyCovariance
from kvswap.selection.choose import top_groups
from kvswap.selection.transform_sketch import TransformSketch, transform_basis
from kvswap.selection.window import Window
from tests.helpers.families import tiny_model

pytestmark = pytest.mark.skipif(not step_loops.available(), reason="no compiled loops: there was no C compiler")

GROUP_TOKENS, SLOTS = 4, 9


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def parts() -> ModelParts:
    return inspect(tiny_model("qwen3"))


@pytest.fixture
def layer(parts):
    found = describe(parts)
    yield found.layers[1]  # what it points to lives as long as this
    found.layers.clear()


def opened(layer: Layer, batch: int) -> Scratch:
    scratch = Scratch([layer], batch, torch.float32)
    angles = noise(batch, 1, layer.head_dim // 2, seed=4).repeat(1, 1, 2)
    scratch.use_rope(angles.cos(), angles.sin(), layer.head_dim)
    return scratch


def choose(scratch: Scratch, layer: Layer, hidden: torch.Tensor, sketch, *, ends, count: int, **size):
    """The groups that are chosen, with none of them in memory."""
    rows, columns = len(ends), 1024
    slots = np.zeros(1, np.int64), np.zeros(1, np.float32), np.zeros(1, np.int32)
    table, visits = np.full((rows, columns), -1, np.int32), np.zeros(1, np.int32)
    arrays = SlotArrays(table, *slots, visits, np.ones(4, np.float32))
    pool = Pool.of(arrays, first=0, gap=0, places=rows * max(count, 1), slot_bytes=64)
    places = {"order": 0, "staging_slot": 7, "staging_address": 4096}
    fetched = scratch.fetch(layer, hidden, sketch, pool, ends=ends, count=count, **size, **places)
    if fetched is None:
        assert visits[0] == 0
        return None
    (reads, out), wanted = fetched, rows * count
    groups = out[:wanted].reshape(rows, count)
    found = array_loops.found(out[wanted:], reads, rows, count)
    real = groups < ends[:, None]
    assert visits[0] == 1
    assert found[8] == found[9] == real.sum() and np.array_equal(found[2], groups[real])
    assert np.array_equal(found[0], np.where(real, 7 + np.cumsum(real).reshape(real.shape) - 1, 0))
    return groups


def sketch_of(parts: ModelParts, lengths: tuple[int, ...], bits: int) -> TransformSketch:
    shape = parts.kv_heads, parts.head_dim
    statistics = KeyCovariance(*shape)
    statistics.add(noise(2000, *shape, seed=1))
    statistics.add_queries(noise(parts.query_heads, 500, shape[1], seed=2))
    sketch = TransformSketch(
        batch=len(lengths),
        kv_heads=shape[0],
        head_dim=shape[1],
        basis=transform_basis(statistics, 24, bits),
        bits=bits,
        capacity_tokens=max(lengths),
        device=torch.device("cpu"),
    )
    for sequence, length in enumerate(lengths):
        sketch.append(sequence, noise(shape[0], length, shape[1], seed=10 + sequence))
    return sketch


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("lengths", [(640,), (600, 200), (3000,), (3008, 640), (2500, 1500, 2052)])
def test_choosing_in_one_call_equals_its_parts(lengths, bits, parts, layer, monkeypatch):
    monkeypatch.setattr(transform, "FLAT_TOKENS", 1024)
    monkeypatch.setattr(transform, "FINE_TOKENS", 512)
    sketch, hidden = sketch_of(parts, lengths, bits), noise(len(lengths), 1, layer.hidden, seed=3)
    scratch, ends = opened(layer, len(lengths)), np.array(lengths) // GROUP_TOKENS
    query = scratch.query(layer, hidden)
    scores = sketch.group_mass(query, parts.scaling, GROUP_TOKENS)
    expected = top_groups(scores, 1, ends, 70).numpy()
    codes = sketch.compiled(GROUP_TOKENS)
    assert codes is not None and sketch.compiled(GROUP_TOKENS) is codes
    found = choose(scratch, layer, hidden, codes, group_tokens=GROUP_TOKENS, first=1, ends=ends, count=70)
    assert np.array_equal(found, expected)
    sketch.append(0, noise(parts.kv_heads, 1200, parts.head_dim, seed=20))  # moves the codes to another place
    assert sketch.compiled(GROUP_TOKENS) is not codes


@pytest.mark.parametrize("flat", [128, 32768])
def test_a_score_that_is_no_number_chooses_nothing(flat, parts, layer, monkeypatch):
    monkeypatch.setattr(transform, "FLAT_TOKENS", flat)
    monkeypatch.setattr(transform, "FINE_TOKENS", 128)
    sketch, hidden = sketch_of(parts, (640,), 4), torch.full((1, 1, layer.hidden), float("nan"))
    size = {"group_tokens": GROUP_TOKENS, "first": 1, "ends": np.array([160]), "count": 20}
    query = torch.full((1, parts.query_heads, parts.head_dim), float("nan"))
    assert bool(sketch.group_mass(query, parts.scaling, GROUP_TOKENS).isnan().any())
    assert choose(opened(layer, 1), layer, hidden, sketch.compiled(GROUP_TOKENS), **size) is None


@pytest.mark.parametrize(
    "wrong", [{"group_tokens": 3}, {"first": -1}, {"ends": np.array([161])}, {"ends": np.array([-1])}, {"count": 0}]
)
def test_choosing_refuses_what_a_sketch_does_not_hold(wrong, parts, layer):
    sketch, hidden = sketch_of(parts, (640,), 4), noise(1, 1, layer.hidden)
    size = {"group_tokens": GROUP_TOKENS, "first": 1, "ends": np.array([160]), "count": 20, **wrong}
    with pytest.raises(ValueError, match="sketch"):
        choose(opened(layer, 1), layer, hidden, sketch.compiled(GROUP_TOKENS), **size)


def test_without_a_sketch_all_groups_are_looked_up(layer):
    size = {"group_tokens": GROUP_TOKENS, "first": 1, "ends": np.array([6, 4]), "count": 5}
    found = choose(opened(layer, 2), layer, noise(2, 1, layer.hidden), None, **size)
    assert found.tolist() == [[1, 2, 3, 4, 5]] * 2


@pytest.mark.parametrize("wrong", [{"order": 1}, {"order": -1}, {"ends": np.array([1025])}, {"count": 7}])
def test_fetching_refuses_what_a_table_does_not_have(wrong, layer):
    arrays = SlotArrays(
        np.full((1, 1024), -1, np.int32),
        np.zeros(1, np.int64),
        np.zeros(1, np.float32),
        np.zeros(1, np.int32),
        np.zeros(1, np.int32),
        np.ones(4, np.float32),
    )
    pool = Pool.of(arrays, first=0, gap=0, places=6, slot_bytes=64)
    size = {"group_tokens": 4, "first": 1, "ends": np.array([1024]), "count": 6, "order": 0, "staging_slot": 0}
    with pytest.raises(ValueError, match="table"):
        opened(layer, 1).fetch(layer, noise(1, 1, layer.hidden), None, pool, staging_address=0, **{**size, **wrong})


@pytest.mark.parametrize("tokens", [(3,), (40,), (500,), (500, 3), (29, 30, 31)])
@pytest.mark.parametrize("some", [False, True])
def test_slots_to_attend_to_are_those_of_the_window(tokens, some, layer):
    window, batch = Window(group_tokens=4, sink_groups=2, recent_groups=4, select_groups=6), len(tokens)
    step, first = window.step(np.array(tokens)), 100 * np.arange(1, batch + 1)
    chosen = np.arange(batch * 6).reshape(batch, 6)
    real = chosen % 4 != 1 if some else None
    slots, valid = step.attended(first, chosen, real)
    pinned = Pinned.of(step.sinks, step.ring, step.sinks_valid, step.ring_valid)
    index, all_real = opened(layer, batch).attended(pinned, first, chosen, real)
    everything = np.ones(index.shape, np.bool_) if all_real is None else all_real
    for b in range(batch):
        expected = slots[b] if valid is None else slots[b][valid[b]]
        assert np.array_equal(index[b][everything[b]], expected)


def arguments(layer: Layer, **changes):
    """A step over some slots, in float32."""
    elements = 2 * layer.kv_heads * GROUP_TOKENS * layer.head_dim
    data = noise(SLOTS, elements, seed=5)
    given = {
        "hidden": noise(1, 1, layer.hidden, seed=3),
        "slots": Slots(data.data_ptr(), SLOTS, 4 * elements, step_loops.FLOAT32, GROUP_TOKENS),
        "pinned": np.array([8]),
        "offset": np.array([1]),
        "index": np.array([[0, 3, 8]]),
    }
    return data, {**given, **changes}


def run(layer: Layer, scratch: Scratch, given) -> torch.Tensor:
    scratch.begin(layer, given["hidden"], given["slots"], given["pinned"], given["offset"])
    return scratch.finish(layer, given["hidden"], given["slots"], given["index"], None, given["offset"])


WRONG = {
    "hidden": [torch.zeros(1, 1, 8), torch.zeros(2, 1, 64), torch.zeros(1, 1, 64, dtype=torch.bfloat16)],
    "pinned": [np.array([SLOTS]), np.array([-1]), np.array([1, 2])],
    "offset": [np.array([GROUP_TOKENS]), np.array([-1])],
    "index": [np.array([[0, SLOTS]]), np.array([[-1, 0]]), np.zeros((1, 0), np.int64), np.array([[1], [2]])],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_step_refuses_what_lies_outside(name, value, layer):
    data, given = arguments(layer, **{name: value})
    before = data.clone()
    with pytest.raises(ValueError):
        run(layer, opened(layer, 1), given)
    assert name == "index" or torch.equal(data, before)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_step_is_the_same_by_any_number_of_threads(threads, layer):
    data, given = arguments(layer)
    expected = run(layer, opened(layer, 1), given)
    torch.set_num_threads(threads)
    found = run(layer, opened(layer, 1), given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    del data
