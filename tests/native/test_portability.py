"""The C code built by other compilers and for other processors gives what the library here gives.

Needs clang, Debian's ``gcc-aarch64-linux-gnu`` and ``qemu-user``; what is missing is skipped.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvswap.native import weight_loops
from kvswap.native.library import required_library
from kvswap.weights.gguf_file import TYPES
from tests.helpers.kernel_calls import Argument, Call, Scratch, Struct, as_floats, build_program, run_calls
from tests.helpers.packed import COMPILED, random_rows
from tests.helpers.ring_calls import ring_calls
from tests.helpers.step_calls import step_calls

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not weight_loops.available(), reason="no compiled loops: there was no C compiler"),
]

ARM = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu"]
BUILDS: dict[str, tuple[list[str], list[str], set[int]]] = {
    "gcc": (["gcc", "-O3"], [], {1}),
    "clang": (["clang", "-O3"], [], {1}),
    "gcc, address and undefined": (
        ["gcc", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        ["env", "ASAN_OPTIONS=detect_leaks=0"],
        {1},
    ),
    "aarch64, gcc": (["aarch64-linux-gnu-gcc", "-O3"], [*ARM, "max"], {1, 5}),
    "aarch64, clang": (["clang", "--target=aarch64-linux-gnu", "-O3"], [*ARM, "max"], {1, 5}),
    "aarch64 without dot products": (["aarch64-linux-gnu-gcc", "-O3"], [*ARM, "cortex-a53"], {1}),
}
"""Compiler, what runs the program, and the kinds of products of weights that must be there."""
SUMS = 2e-6
"""Sums of floats in another order: about 2^5 of 24 bits."""


def floats(noise: np.random.Generator, *shape: int) -> np.ndarray:
    return noise.standard_normal(shape, np.float32)


def halves(noise: np.random.Generator, *shape: int, bfloat16: bool) -> np.ndarray:
    values = floats(noise, *shape)
    return (values.view(np.uint32) >> 16).astype(np.uint16) if bfloat16 else values.astype(np.float16).view(np.uint16)


def weight_calls(kind: int) -> Iterator[Call]:
    """Products of every type, for one kind of processor, and its unpacking."""
    noise = np.random.default_rng(0)
    library, rows, columns = required_library(), 37, 512
    for number in COMPILED:
        packed = random_rows(number, rows, columns).numpy()
        for fine, count, paired in ((0, 1, 0), (1, 3, 0), (0, 8, 0), (0, 2, 36)):
            used = rows - 1 if paired else rows
            value = weight_loops.Matrix(0, number, used, columns, packed.shape[1], paired, fine)
            matrix = Struct(value, {weight_loops.Matrix.data.offset: packed})
            scratch = Scratch(count * library.kvswap_activation_bytes(number, columns))
            x, y, bias = floats(noise, count, columns), np.zeros((count, used), np.float32), floats(noise, used)
            yield Call("packed_linear", [matrix, x, count, y, bias, 1, scratch, kind], kind=kind)
            yield Call("unpack", [matrix, 1, 35, np.zeros((34, columns), np.float32), 1, kind], kind=kind)


def rounding_calls() -> Iterator[Call]:
    """Vectors as products take them, ties and what is not finite as well."""
    noise = np.random.default_rng(0)
    ties = np.tile(np.array([127, 0.5, 1.5, -2.5, 126.5, -0.5, 3, 1e-3], np.float32), 64)
    odd = floats(noise, 512)
    odd[[3, 300]] = np.inf, np.nan
    for number in (0, 8, 12):
        for x in (floats(noise, 512), ties, ties / np.float32(3.7), odd, np.zeros(512, np.float32)):
            size_bytes = required_library().kvswap_activation_bytes(number, 512)
            yield Call("round_activation", [number, 1, x, 512, np.zeros(size_bytes, np.uint8)])


def slot_calls() -> Iterator[Call]:
    """Elements from and to 16 bits, and attention to them."""
    noise = np.random.default_rng(0)
    slots, batch, heads, group, dim = 9, 2, 3, 4, 20
    size, index = 2 * heads * group * dim + 8, np.array([[0, 8, 3], [5, 5, 1]], np.int64)
    for bfloat16 in (False, True):
        stored = halves(noise, slots, size, bfloat16=bfloat16)
        out = np.zeros((2, batch, heads, 3 * group * dim), np.float32)
        run: list[Argument] = [stored, slots, size, index, batch, 3, heads, group * dim, int(bfloat16), 1, out]
        yield Call("gather", run)
        all_bits = np.arange(1 << 16, dtype=np.uint16)
        if not bfloat16:  # signalling NaNs keep or lose their bit: no model has them
            exponent = all_bits & 0x7C00
            all_bits[(exponent == 0x7C00) & (all_bits & 0x03FF > 0)] = 0x7E00
        out = np.zeros(1 << 16, np.float32)
        first = np.array([0], np.int64)
        yield Call("gather", [all_bits, 1, 1 << 16, first, 1, 1, 1, 1 << 15, int(bfloat16), 1, out])
        keys, values = floats(noise, batch, heads, dim) * 1e-4, floats(noise, batch, heads, dim) * 1e5
        keys[0, 0, :3], values[1, 1, :3] = (np.inf, -0.0, 1e-8), (-np.inf, 65519.0, 65520.0)
        strides = np.array([heads * dim, dim] * 2, np.int64)
        places = np.array([8, 2], np.int64), np.array([0, 3], np.int64)
        put: list[Argument] = [
            stored,
            slots,
            size,
            *places,
            batch,
            heads,
            group,
            dim,
            int(bfloat16),
            keys,
            values,
            strides,
        ]
        yield Call("put_tokens", put)
        yield Call("put_tokens", [*put[:1], 8, *put[2:]])  # a slot that is not there
        rows, floats_needed = 5, required_library().kvswap_attending_floats(heads, 5, dim, 2)
        state = np.full((heads, rows), -np.inf, np.float32), np.zeros((heads, rows), np.float32)
        result = np.zeros((heads, rows, dim), np.float32)
        attend: list[Argument] = [stored, slots, size, np.arange(9), 9, heads, group, dim, int(bfloat16)]
        attend += [floats(noise, heads, rows, dim) / 4, rows, 2, Scratch(4 * floats_needed), *state, result]
        yield Call("attend_groups", attend, bound=SUMS)


def table_calls() -> Iterator[Call]:
    """Looking up, planning, locating, admitting."""
    noise = np.random.default_rng(0)
    table = np.full((4, 50), -1, np.int32)
    table[1, 5:9], table[2, 0] = np.arange(20, 24), 25
    worth, seen, powers = np.ones(10, np.float32), np.zeros(10, np.int32), 0.9 ** np.arange(8, dtype=np.float32)
    groups, ends = np.array([[3, 5, 6, 7, 12, 50], [0, 1, 2, 30, 49, 50]], np.int64), np.array([50, 40], np.int64)
    found: list[Argument] = [table, 4, 50, 1, groups, 2, 6, ends, 20, 3, powers, 7, worth, seen, 2, 12, 4, 1 << 20, 64]
    yield Call("find", [*found, np.zeros(10 * 12 + 3, np.int64)])
    rows, which = np.array([1, 2, 0], np.int64), np.array([6, 0, 9], np.int64)
    yield Call("lookup", [table, 4, 50, rows, which, 3, 20, 3, powers, 7, worth, seen, np.zeros(3, np.int64)])
    files, wanted = (
        np.repeat(np.arange(3), 20),
        np.concatenate([np.sort(noise.choice(90, 20, False)) for _ in range(3)]),
    )
    extents = [np.zeros(60, np.int64) for _ in range(5)]
    yield Call("plan_reads", [files, wanted, 60, 3, 9, np.zeros(60, np.uint8), *extents])
    starts, at = np.array([[0, 0], [40, 30]], np.int64), np.array([[4, 5], [6, 6]], np.int64)
    extent = np.array([0, 1, 1]), np.array([0, 28, 35]), np.array([50, 9, 30]), np.array([0, 1 << 16, 1 << 20])
    yield Call("locate", [starts, at, np.array([0, 8]), 2, 2, *extent, 3, 64, 20, np.zeros(80, np.int64)])
    owner, memory = np.arange(55, 65), noise.integers(0, 256, (30, 64), np.uint8)
    admit: list[Argument] = [
        table,
        200,
        50,
        owner,
        worth / 3,
        seen,
        np.array([1, 4, 2, 2], np.int32),
        10,
        7,
        8,
        powers,
        7,
    ]
    admit += [1, np.array([70, 71, 72]), np.array([0, 3, 4]), 3, Scratch(64), memory, 64, 20]
    yield Call("admit", admit)


def scoring_calls(kind: int) -> Iterator[Call]:
    """Mass of groups for one kind of products, and what is chosen by it."""
    noise = np.random.default_rng(0)
    library, batch, heads, tiles = required_library(), 2, 6, 5
    for bits, rows in ((2, 7), (4, 13)):
        codes, tokens = noise.integers(0, 256, (batch, tiles, rows, 64), np.uint8), np.array([320, 200], np.int64)
        query, scales = floats(noise, batch, heads, rows * 8 // bits) / 2, np.abs(floats(noise, rows * 8 // bits))
        scratch = Scratch(4 * library.kvswap_scratch_floats(rows, bits, heads, tiles, 4, batch, 1) + 64)
        shape: list[Argument] = [
            codes,
            tiles * rows * 64,
            rows * 64,
            rows,
            bits,
            query,
            scales,
            batch,
            heads,
            tokens,
            4,
        ]
        mass = np.zeros((batch, 80), np.float32)
        yield Call("group_mass", [*shape, None, kind, 1, scratch, mass, 80], bound=SUMS, kind=kind)
        coarse: list[Argument] = [codes, rows * 64, rows, bits, query, scales, heads, 320, 1]
        yield Call("tile_mass", [*coarse, scratch, np.zeros(tiles, np.float32)], bound=SUMS)
    scores, picked = np.abs(floats(noise, 3, 200)).round(1), np.zeros((3, 40), np.int64)
    yield Call("top_groups", [scores, 3, 200, 1, np.array([200, 100, 20]), 40, Scratch(800), picked])


def query_calls() -> Iterator[Call]:
    """Norm, RoPE, and queries in the directions of a sketch."""
    noise = np.random.default_rng(0)
    x, out = floats(noise, 4, 72), np.zeros((4, 72), np.float32)
    yield Call("rms_norm", [x, floats(noise, 72), 4, 72, 1.0, 1e-6, out], bound=SUMS)
    angles = floats(noise, 2, 36)
    yield Call("rotate", [x, np.cos(angles), np.sin(angles), 2, 2, 18, 36, out], bound=SUMS)
    matrix, low = halves(noise, 3, 36, 20, bfloat16=False), np.zeros((2, 6, 20), np.float32)
    yield Call("project", [floats(noise, 2, 6, 36), matrix, 2, 3, 2, 36, 20, 0.3, low], bound=SUMS)


def all_calls(kinds: Iterable[int]) -> list[Call]:
    """Calls of everything, those that have kinds with each of them; two lists with as many kinds belong together."""
    forced = [call for kind in kinds for calls in (weight_calls, scoring_calls) for call in calls(kind)]
    return [*forced, *rounding_calls(), *slot_calls(), *table_calls(), *query_calls(), *step_calls(), *ring_calls()]


def differences(call: Call, expected: list[np.ndarray], found: list[np.ndarray]) -> Iterator[str]:
    for n, (array, ours, theirs, counts) in enumerate(zip(call.buffers, expected, found, call.counts, strict=True)):
        if not counts or np.array_equal(ours, theirs):
            continue
        where = f"{'+'.join(call.names)} kind {call.kind} buffer {n}"
        a, b = as_floats(ours, array.dtype), as_floats(theirs, array.dtype)
        if a is None or b is None or not call.bound:
            if a is not None and b is not None and np.array_equal(a, b, equal_nan=True):
                continue
            place = np.flatnonzero(ours != theirs)[0] // array.itemsize
            yield f"{where}: element {place} is {theirs.view(array.dtype)[place]}, not {ours.view(array.dtype)[place]}"
            continue
        most = np.abs(a).max()
        if not np.abs(a - b).max() <= call.bound * most:
            yield f"{where}: {np.abs(a - b).max() / most:.1e} of the largest"


def wrong_results(call: Call, expected: list[int], returned: list[int]) -> Iterator[str]:
    for name, ours, theirs in zip(call.names, expected, returned, strict=True):
        if getattr(required_library(), f"kvswap_{name}").restype is ctypes.c_int64 and ours != theirs:
            yield f"{name} returns {theirs} instead of {ours}"


@pytest.mark.parametrize("name", BUILDS)
def test_another_build_gives_the_same(name: str, tmp_path: Path) -> None:
    compiler, runner, needed = BUILDS[name]
    for tool in (compiler[0], *runner[:1], *(["aarch64-linux-gnu-gcc"] if name.startswith("aarch64") else [])):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    kinds = (0, *weight_loops.KINDS)
    calls, plain = all_calls(kinds), all_calls(1 for _ in kinds)  # plain products are what all others have to equal
    program = build_program(compiler, tmp_path)
    there, wrong = set(), []
    for call, same, (returned, found) in zip(
        calls, plain, run_calls([*runner, str(program)], calls, tmp_path), strict=True
    ):
        if call.kind and returned == [0] and call.name in ("packed_linear", "unpack", "group_mass"):
            continue  # this processor has no such kind
        there |= {call.kind} if call.name == "packed_linear" else set()
        expected, buffers = same.here()
        wrong += wrong_results(call, expected, returned)
        wrong += differences(call, buffers, found)
    assert not wrong, "\n".join(wrong[:20])
    assert needed <= there, f"kinds {sorted(there)}"
    names = {name for call in calls for name in call.names}
    assert names >= {"packed_linear", "attend_groups", "find", "put_tokens"}
    assert names >= {"step_query", "step_fetch", "attended", "step_begin", "step_finish", "ring_submit", "ring_collect"}
    assert len(TYPES) >= len(COMPILED)
