"""Compiled loops against plain arithmetic, and what happens where they are not there."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvswap.native import library, loops, query_loops, threads
from kvswap.selection.score import unpack

compiled = pytest.mark.skipif(not loops.available(), reason="no compiled loops: there was no C compiler")


@pytest.fixture
def reloaded() -> Iterator[None]:
    """What is loaded is looked for anew, before and after."""
    caches = library.library, library.required_library, threads.threaded_library
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiles_of(codes: torch.Tensor) -> torch.Tensor:
    """Rows of codes ``[rows, C]`` as tiles with something between them."""
    tiles = codes.unflatten(1, (-1, 64)).transpose(0, 1)
    return torch.cat((tiles, torch.full_like(tiles, 0xA5)), 1)[:, : len(codes)]


def expected_mass(query: torch.Tensor, codes: torch.Tensor, bits: int, tokens: int, group_tokens: int) -> torch.Tensor:
    """Softmax of rounded queries times codes in float64, over heads and groups."""
    step = query.abs().amax(1, keepdim=True) / 127
    rounded = (query / step).double()
    rounded = torch.sign(rounded) * (rounded.abs() + 0.5).floor()
    levels = unpack(codes, bits)[:, :tokens].double() - (1 << (bits - 1))
    return torch.softmax(rounded @ levels * step.double(), -1).sum(0).view(-1, group_tokens).sum(1)


@compiled
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    ("heads", "rank", "tokens", "group_tokens"),
    [
        *((1, 8, 4, 4), (3, 96, 64, 1), (4, 64, 100, 4), (9, 96, 1000, 8)),
        *((14, 40, 448, 32), (5, 256, 640, 64), (6, 32, 130, 2), (2, 16, 48, 16)),
    ],
)
def test_mass_of_packed_codes(bits: int, heads: int, rank: int, tokens: int, group_tokens: int) -> None:
    capacity = (tokens + 255) // 256 * 256
    random = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (rank * bits // 8, capacity), dtype=torch.uint8, generator=random)
    query = noise(heads, rank) * 0.2
    query[0] *= 40  # one head looks at a single token
    scales = noise(rank, seed=2).abs() + 0.1
    found = loops.group_mass(tiles_of(codes)[None], query[None], scales, bits, np.array([tokens]), group_tokens)[0]
    expected = expected_mass(query * scales, codes, bits, tokens, group_tokens)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert float(found.sum()) == pytest.approx(heads, rel=1e-4)


@compiled
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_query_that_is_no_number_gives_no_scores(value: float) -> None:
    codes, query = torch.zeros(24, 256, dtype=torch.uint8), noise(9, 48)
    query[4, 7] = value
    assert bool(
        loops.group_mass(tiles_of(codes)[None], query[None], torch.ones(48), 4, np.array([256]), 4).isnan().any()
    )


@compiled
def test_chosen_tiles_are_scored_as_if_there_were_no_others() -> None:
    codes = torch.randint(0, 256, (24, 1024), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    query, scales, chosen = noise(9, 48), noise(48, seed=2).abs(), np.array([1, 2, 9, 13])

    def score(codes: torch.Tensor, tokens: int, tiles: NDArray[np.int64] | None = None) -> torch.Tensor:
        return loops.group_mass(tiles_of(codes)[None], query[None], scales, 4, np.array([tokens]), 4, tiles)[0]

    alone = torch.cat([codes[:, tile * 64 : tile * 64 + 64] for tile in chosen], 1)
    assert torch.equal(score(codes, 896, chosen), score(alone, 256))
    short = score(codes, 880, chosen)  # the last tile has 48 tokens
    assert short.shape == (60,) and float(short.sum()) == pytest.approx(9, rel=1e-4)
    with pytest.raises(ValueError, match="tiles outside a sequence of 832 tokens"):
        score(codes, 832, chosen)


@compiled
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("rows", [1, 6, 7, 40])
def test_all_ways_to_multiply_give_the_same(bits: int, rows: int) -> None:
    codes = torch.randint(0, 256, (1, 5, rows, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    codes[0, 2] = 255  # the largest codes and queries of one sign: sums of 16 bits are as large as they get
    query, scales = noise(1, 7, rows * 8 // bits), torch.ones(rows * 8 // bits)
    query[0, 3] = 0.3
    found = []
    for kind in (1, 2, 3):
        try:
            found.append(loops.group_mass(codes, query, scales, bits, np.array([300]), 4, kind=kind))
        except ValueError as error:
            assert f"this processor has no products of kind {kind}" in str(error) and kind > 1
    assert all(torch.equal(each, found[0]) for each in found)
    assert torch.equal(loops.group_mass(codes, query, scales, bits, np.array([300]), 4), found[0])


@compiled
@pytest.mark.parametrize("threads", [1, 3])
def test_sequences_of_a_batch_are_scored_as_if_alone(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "GRAIN", 1)
    codes = torch.randint(0, 256, (3, 8, 24, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    query, scales, tokens = noise(3, 9, 48), noise(48, seed=2).abs() * 0.1, np.array([512, 20, 300])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = loops.group_mass(codes, query, scales, 4, tokens, 4)
        torch.set_num_threads(1)
        one = [slice(b, b + 1) for b in range(3)]
        alone = [loops.group_mass(codes[b], query[b], scales, 4, tokens[b], 4) for b in one]
    finally:
        torch.set_num_threads(before)
    assert found.shape == (3, 128)
    for row, each in zip(found, alone, strict=True):
        assert torch.allclose(row[: each.shape[1]], each[0], rtol=1e-5, atol=1e-12) and not row[each.shape[1] :].any()


@compiled
def test_threads_are_those_of_pytorch() -> None:
    if "OpenMP" not in torch.__config__.parallel_info().split("ATen parallel backend:")[1]:
        pytest.skip("this PyTorch computes without OpenMP")
    assert threads.openmp() is not None


def score_batch() -> torch.Tensor:
    codes = torch.randint(0, 256, (2, 8, 24, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return loops.group_mass(codes, noise(2, 9, 48), noise(48, seed=2).abs() * 0.1, 4, np.array([512, 300]), 4)


@pytest.fixture
def other_threads() -> Iterator[ctypes.CDLL]:
    """The loops, to be given other threads; afterwards they have PyTorch's again."""
    loops_there = library.library()
    assert loops_there is not None
    yield loops_there
    loops_there.kvswap_use_threads(None, None, None)
    threads.threaded_library.cache_clear()
    threads.threaded_library()


@compiled
def test_loops_are_shared_out_to_the_runtime(other_threads: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime whose threads take turns: it is asked for all of them, and each does its share."""
    alone, asked, number = score_batch(), [], [0]
    monkeypatch.setattr(loops, "GRAIN", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def parallel(function: int, data: int, count: int, flags: int) -> None:
        asked.append(count)
        for number[0] in range(count):
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(data)

    one, many = (ctypes.CFUNCTYPE(ctypes.c_int)(each) for each in (lambda: number[0], lambda: asked[-1]))
    other_threads.kvswap_use_threads(*(ctypes.cast(each, ctypes.c_void_p) for each in (parallel, one, many)))
    shared = score_batch()
    assert asked == [3, 2]  # two parts of each sequence, then the two sequences
    assert torch.allclose(shared, alone, rtol=1e-5, atol=1e-12)


@compiled
def test_without_a_runtime_one_thread_does_it_all(
    other_threads: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shared = score_batch()
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    assert threads.openmp() is None
    (tmp_path / "torch" / "lib" / "libgomp.so.1").write_bytes(b"no library")
    assert threads.openmp() is None
    other_threads.kvswap_use_threads(None, None, None)
    monkeypatch.setattr(loops, "GRAIN", 1)
    assert torch.allclose(score_batch(), shared, rtol=1e-5, atol=1e-12)


@compiled
def test_a_way_to_multiply_that_there_is_not_is_refused() -> None:
    codes, query = torch.zeros(1, 1, 4, 64, dtype=torch.uint8), noise(1, 2, 8)
    with pytest.raises(ValueError, match="this processor has no products of kind 4"):
        loops.group_mass(codes, query, torch.ones(8), 4, np.array([64]), 4, kind=4)


@compiled
@pytest.mark.parametrize("shape", [(1, 9, 3, 64, 96), (3, 4, 2, 16, 600), (2, 8, 8, 32, 5)])
def test_queries_are_projected_by_the_matrix_of_their_head(shape: tuple[int, ...]) -> None:
    batch, heads, kv_heads, elements, rank = shape
    query, matrix = noise(batch, heads, elements), noise(kv_heads, elements, rank, seed=1).half()
    found = query_loops.project(query, matrix, 0.25)
    by_head = (query * 0.25).view(batch, kv_heads, -1, elements) @ matrix.float()
    assert torch.allclose(found, by_head.view(batch, heads, rank), rtol=1e-4, atol=1e-4)


@compiled
@pytest.mark.parametrize(("rows", "elements"), [(1, 576), (3, 7), (2, 33)])
def test_norms_are_those_of_torch(rows: int, elements: int) -> None:
    hidden, weight = 5 * noise(rows, elements), noise(elements, seed=1)
    for offset in (0.0, 1.0):
        wanted = torch.nn.functional.rms_norm(hidden, (elements,), weight + offset, 1e-3)
        assert torch.allclose(query_loops.rms_norm(hidden, weight, offset, 1e-3), wanted, rtol=1e-5, atol=1e-5)
    spread = torch.stack((hidden, hidden), dim=-1)[..., 0]  # elements are not neighbours
    assert torch.equal(query_loops.rms_norm(spread, weight, 0.0, 1e-3), query_loops.rms_norm(hidden, weight, 0.0, 1e-3))


@compiled
@pytest.mark.parametrize("angles", [1, 3])
def test_halves_are_rotated_by_the_angles_of_their_sequence(angles: int) -> None:
    query, angle = noise(3, 5, 14), noise(angles, 1, 7, seed=1)
    cos, sin = angle.cos().repeat(1, 1, 2), angle.sin().repeat(1, 1, 2)
    low, high = query.chunk(2, dim=-1)
    wanted = query * cos + torch.cat((-high, low), dim=-1) * sin
    assert torch.allclose(query_loops.rotate_halves(query, cos, sin), wanted, atol=1e-6)
    with pytest.raises(ValueError, match=r"cos \(., 1, 12\)"):
        query_loops.rotate_halves(query, cos[..., :-2], sin[..., :-2])


@compiled
@pytest.mark.parametrize(("bits", "rows"), [(2, 1), (2, 6), (2, 8), (4, 1), (4, 3), (4, 6), (4, 16)])
def test_tiles_promise_what_their_best_token_does(bits: int, rows: int) -> None:
    codes = torch.randint(0, 256, (rows, 640), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    query = noise(5, rows * 8 // bits) * 0.3
    found = loops.tile_mass(tiles_of(codes), query, torch.ones(rows * 8 // bits), bits, 640)
    step = query.abs().amax(1, keepdim=True) / 127
    levels = unpack(codes, bits).float() - (1 << (bits - 1))
    best = ((query / step).round() @ levels * step).unflatten(1, (-1, 64)).amax(2)
    assert torch.allclose(found, torch.softmax(best, -1).sum(0), rtol=1e-3, atol=1e-6)


@compiled
def test_what_lies_past_the_last_token_does_not_count() -> None:
    codes = torch.full((48, 256), 0x77, dtype=torch.uint8)
    codes[:, 72:] = 0xFF
    query = noise(1, 3, 96).abs()
    found = loops.group_mass(tiles_of(codes)[None], query, torch.ones(96), 4, np.array([72]), 4)[0]
    assert torch.allclose(found, torch.full((18,), 3 / 18))


@compiled
def test_a_query_of_zeros_sees_all_tokens_alike() -> None:
    codes = torch.randint(0, 256, (8, 256), dtype=torch.uint8)
    found = loops.group_mass(tiles_of(codes)[None], torch.zeros(1, 2, 16), torch.ones(16), 4, np.array([64]), 4)[0]
    assert torch.allclose(found, torch.full((16,), 2 / 16))


@compiled
@pytest.mark.parametrize("count", [1, 7, 50, 200])
def test_best_groups_with_many_equals(count: int) -> None:
    scores = torch.randint(0, 12, (150,), generator=torch.Generator().manual_seed(3)).float()
    picked = loops.top_groups(torch.stack((scores.flip(0), scores)), 20, [30, 140], count)
    best = sorted(range(20, 140), key=lambda group: (-scores[group], group))[:count]
    assert picked[1].tolist() == sorted(best) + [150] * (count - len(best))
    assert picked.shape == (2, count) and (picked[0, 10:] == 150).all()


@compiled
@pytest.mark.parametrize("count", [3, 5, 8])
def test_best_groups_where_most_have_nothing(count: int) -> None:
    scores = torch.zeros(100)
    scores[[7, 31, 32, 90, 99]] = torch.tensor([0.5, 0.2, 0.9, 0.1, 0.4])
    best = sorted(range(2, 100), key=lambda group: (-scores[group], group))[:count]
    assert loops.top_groups(scores[None], 2, [100], count)[0].tolist() == sorted(best)


@compiled
def test_no_range_has_no_groups() -> None:
    assert loops.top_groups(torch.ones(1, 4), 3, [2], 1).tolist() == [[4]]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_where_there_is_a_compiler_the_loops_are_compiled() -> None:
    assert loops.available()


def test_without_the_library_nothing_is_scored_here(
    reloaded: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level("DEBUG", logger="kvswap"):
        assert not loops.available()
    assert "compiled loops are missing" in caplog.text
    assert not loops.scores_here(4, 4, torch.device("cpu"))
    for call in (library.required_library, threads.threaded_library):
        with pytest.raises(RuntimeError, match="compiled loops are missing"):
            call()


def test_another_file_in_its_place_is_not_used(reloaded: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = tmp_path / "kernels.so"
    wrong.write_bytes(b"no library")
    spec = importlib.machinery.ModuleSpec("kvswap.native._kernels", None, origin=str(wrong))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert not loops.available()


@compiled
def test_loops_of_another_version_are_not_used(reloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "VERSION", library.VERSION + 1)
    assert not loops.available()


@compiled
def test_codes_that_do_not_fit_are_left_to_torch() -> None:
    cpu = torch.device("cpu")
    assert loops.scores_here(4, 4, cpu)
    assert not loops.scores_here(8, 4, cpu)
    assert not loops.scores_here(4, 3, cpu)
    assert not loops.scores_here(4, 4, torch.device("meta"))
