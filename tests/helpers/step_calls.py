"""Calls of the functions of a decode step for other builds: tiny layers with float and packed weights, stored K and V.

What they choose, look up and plan are integers, and equal in every build. Hidden states, K and V are sums of floats in
an order of the compiler's: ``BOUNDS`` says how far they may be off. A rounded vector may be rounded the other way where
its norm is, which moves one product in hundreds by one step of 8 bits: ``PACKED``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np

from kvswap.native.library import required_library
from kvswap.native.step_loops import GELU_TANH, SILU, Layer, Linear, Norm, Pinned, Pool, Sketch, Slots, Step, Tally
from kvswap.native.weight_loops import Matrix
from tests.helpers.kernel_calls import BFLOAT16, Argument, Call, Scratch, Struct
from tests.helpers.packed import random_rows

F32, F16, BF16, Q8_0, Q4_K, Q6_K = 0, 1, 30, 8, 12, 14
BOUNDS = {F32: 2e-5, F16: 1e-3, BF16: 8e-3}
"""Share of the largest number that a number may be off by, by the type that it is stored in: a last bit is in it."""
PACKED = 5e-3
BATCH, GROUP_TOKENS, SLOTS, WIDTH, TILE = 2, 4, 12, 5, 64
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("input", "q_norm", "k_norm", "after_attention", "before_mlp", "after_mlp")


def floats(noise: np.random.Generator, *shape: int) -> np.ndarray:
    return noise.standard_normal(shape, np.float32)


def stored(values: np.ndarray, kind: int) -> np.ndarray:
    """Floats as elements of a type."""
    if kind == F16:
        return values.astype(np.float16)
    return values if kind == F32 else (values.view(np.uint32) >> 16).astype(np.uint16).view(BFLOAT16)


class Tiny:
    """A layer whose matrices have the types ``kinds``, cyclically; ``whole`` has biases and all norms, and GELU."""

    def __init__(self, kinds: tuple[int, ...], hidden: int, *, whole: bool) -> None:
        noise, heads, kv_heads, head_dim = np.random.default_rng(7), 4, 2, 16
        if hidden >= 256:
            head_dim = 64  # o takes as many inputs as heads have elements, in whole blocks
        inner, queries, keys = 2 * hidden, heads * head_dim, kv_heads * head_dim
        self.packed = not set(kinds) <= {F32, BF16}
        self.value = Layer(hidden, heads, kv_heads, head_dim, inner, GELU_TANH if whole else SILU, head_dim**-0.5)
        self.pointers: dict[int, np.ndarray | Scratch] = {}
        shapes = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
        shapes |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        for number, name in enumerate(MATRICES):
            (rows, columns), kind = shapes[name], kinds[number % len(kinds)]
            weight = random_rows(kind, rows, columns, seed=number).numpy()
            if kind == F32:
                weight = weight.view(np.float32) / np.float32(columns**0.5)
            paired = head_dim if whole and name in ("q", "k") else 0
            matrix = Matrix(0, kind, rows, columns, weight.nbytes // rows, paired, int(name == "down"))
            setattr(self.value, name, Linear(matrix, None))
            at = getattr(Layer, name).offset
            self.pointers[at + Linear.matrix.offset + Matrix.data.offset] = weight
            if whole:
                self.pointers[at + Linear.bias.offset] = floats(noise, rows)
        for name in NORMS if whole else ("input", "before_mlp"):
            size = head_dim if name in ("q_norm", "k_norm") else hidden
            setattr(self.value, name, Norm(None, 1.0 if whole else 0.0, 1e-6))
            scale = np.float32(0.1 if self.packed and not whole else 1.0)  # random codes are large weights
            self.pointers[getattr(Layer, name).offset + Norm.weight.offset] = scale * floats(noise, size)

    def struct(self) -> Struct:
        return Struct(self.value, self.pointers)


def step_struct(layer: Tiny, kind: int, workers: int) -> Struct:
    """A step of ``BATCH`` sequences, with twice the scratch that is needed here: other processors may need more."""
    size = 2 * step_bytes(layer, workers)
    noise, dim = np.random.default_rng(8), layer.value.head_dim
    half = floats(noise, BATCH, dim // 2)
    angles = np.concatenate([half, half], 1)
    value = Step(BATCH, workers, kind, dim, None, None, None, size)
    rope = {Step.cosine.offset: np.cos(angles), Step.sine.offset: np.sin(angles)}
    return Struct(value, {**rope, Step.scratch.offset: Scratch(size)})


def step_bytes(layer: Tiny, workers: int) -> int:
    """Scratch of a step; the layer's pointers are not followed for it."""
    return int(required_library().kvswap_step_bytes(ctypes.byref(layer.value), BATCH, workers))


LAYERS = {
    "float32": Tiny((F32,), 64, whole=False),
    "bfloat16": Tiny((BF16, F32), 64, whole=True),
    "8 bits": Tiny((Q8_0,), 64, whole=False),
    "4 and 6 bits": Tiny((Q4_K, Q6_K, Q8_0), 256, whole=True),
}


def layer_calls() -> Iterator[Call]:
    """Query, K and V, and output, over slots of every type, in one call each and one after the other."""
    noise = np.random.default_rng(9)
    for layer in LAYERS.values():
        for kind, hidden_kind, workers in ((F16, F32, 1), (BF16, BF16, 3), (F32, F32, 3)):
            hidden = stored(floats(noise, BATCH, layer.value.hidden), hidden_kind)
            bound = max(BOUNDS[kind], BOUNDS[hidden_kind], PACKED if layer.packed else 0.0)
            own, step = layer.struct(), step_struct(layer, hidden_kind, workers)
            query = np.zeros((BATCH, layer.value.heads * layer.value.head_dim), np.float32)
            yield Call("step_query", [own, step, hidden, query], bound=bound)
            elements = 2 * layer.value.kv_heads * GROUP_TOKENS * layer.value.head_dim
            data = stored(floats(noise, SLOTS, elements), kind)
            slots = Struct(Slots(None, SLOTS, data.nbytes // SLOTS, kind, GROUP_TOKENS), {Slots.data.offset: data})
            index, offset = np.array([[0, 3, 4, 7, 8], [1, 9, 2, 6, 11]], np.int64), np.array([3, 1], np.int64)
            valid, output = np.array([[1, 1, 0, 1, 1], [1, 0, 1, 1, 1]], np.uint8), np.zeros_like(hidden)
            pinned = np.ascontiguousarray(index[:, -1])
            finish: list[Argument] = [own, step, slots, index, valid, WIDTH, offset, output]
            begin: list[Argument] = [own, step, hidden, slots, pinned, offset]
            yield Call("step_begin", begin, bound=bound, then=[("step_finish", finish)])
            without: list[Argument] = [*finish[:4], None, *finish[5:]]
            yield Call("step_begin", begin, bound=bound, then=[("step_finish", without)])
    outside: list[Argument] = [*begin[:4], np.array([0, SLOTS], np.int64), offset]
    yield Call("step_begin", outside)
    yield Call("step_finish", [*finish[:6], np.array([0, GROUP_TOKENS], np.int64), output])


def pool_struct(noise: np.random.Generator, columns: int) -> Struct:
    """Two layers' groups, every third of which is in memory."""
    table = np.full((2 * BATCH, columns), -1, np.int32)
    table[:, ::3] = np.arange(table[:, ::3].size).reshape(2 * BATCH, -1)
    slots = int(table.max()) + 1
    value = Pool(None, 2 * BATCH, columns, 20, None, 8, None, None, None, 2, 3 * columns, 1 << 10)
    arrays = {"table": table, "powers": 0.9 ** np.arange(9, dtype=np.float32), "worth": np.ones(slots, np.float32)}
    arrays |= {"seen": np.zeros(slots, np.int32), "visits": np.array([4, 6], np.int32)}
    return Struct(value, {getattr(Pool, name).offset: array for name, array in arrays.items()})


def fetch_calls() -> Iterator[Call]:
    """Choosing by packed codes, in one level and two, looking up and planning."""
    noise, layer, tiles = np.random.default_rng(10), LAYERS["float32"], 6
    lengths = np.array([TILE * tiles, TILE * 3 + 20], np.int64)
    ends, count, columns = lengths // GROUP_TOKENS, 24, TILE * tiles // GROUP_TOKENS
    for bits, rows, flat in ((2, 6, 1 << 20), (4, 10, 1 << 20), (4, 10, TILE * 2), (2, 6, TILE * 4)):
        rank = rows * 8 // bits
        codes = noise.integers(0, 256, (BATCH, tiles, rows, TILE), np.uint8)
        shape = layer.value.kv_heads, layer.value.head_dim, rank
        projection, scales = stored(floats(noise, *shape), F16), np.abs(floats(noise, rank)) / 4
        value = Sketch(None, tiles * rows * TILE, rows * TILE, tiles, rows, bits, 4, None, None, None, flat, 2)
        arrays = {"codes": codes, "projection": projection, "scales": scales, "tokens": lengths}
        sketch = Struct(value, {getattr(Sketch, name).offset: array for name, array in arrays.items()})
        floats_needed = 1 << 16
        out = np.zeros(11 * BATCH * count + 3, np.int64)
        for codes_or_none, first in ((sketch, 1), (None, 2)):
            step = step_struct(layer, F32, 2)
            sums = {each.offset: np.zeros((BATCH, columns), np.float32) for each in (Tally.groups, Tally.squares)}
            step.pointers[Step.tally.offset] = Struct(Tally(None, None, columns, 0.0, 0), sums)
            yield Call(
                "step_fetch",
                [
                    *(layer.struct(), step, floats(noise, BATCH, layer.value.hidden)),
                    *(codes_or_none, GROUP_TOKENS, first, ends, count, Scratch(4 * floats_needed), floats_needed),
                    *(pool_struct(noise, columns), 1, 90, 1 << 20, out),
                ],
                bound=1e-4,
            )


def attended_calls() -> Iterator[Call]:
    """All slots of a step in order, where some are not real."""
    sinks, ring = np.array([[0, 1], [2, 3]], np.int64), np.array([[4, 5, 6], [6, 4, 5]], np.int64)
    chosen, first = np.array([[30, 31, 32, 33], [40, 41, 42, 43]], np.int64), np.array([100, 200], np.int64)
    arrays = {"sinks": sinks, "ring": ring, "sinks_real": np.ones((2, 2), np.uint8)}
    arrays["ring_real"] = np.array([[1, 1, 1], [0, 1, 1]], np.uint8)
    pinned = Struct(
        Pinned(None, None, None, None, 2, 3), {getattr(Pinned, name).offset: each for name, each in arrays.items()}
    )
    for real in (None, np.array([[1, 1, 0, 1], [1, 1, 1, 1]], np.uint8)):
        index, all_real = np.zeros((2, 9), np.int64), np.zeros((2, 9), np.uint8)
        yield Call("attended", [pinned, BATCH, first, chosen, real, 4, index, all_real])


def step_calls() -> list[Call]:
    """Calls of everything in ``step_loops``."""
    return [*layer_calls(), *fetch_calls(), *attended_calls()]
