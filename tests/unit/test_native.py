"""Compiled loops against plain arithmetic, and what happens where they are not there."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kvswap.native import library, loops
from kvswap.sketch.score import unpack

compiled = pytest.mark.skipif(not loops.available(), reason="no compiled loops: there was no C compiler")


@pytest.fixture
def reloaded() -> Iterator[None]:
    """What is loaded is looked for anew, before and after."""
    library.library.cache_clear()
    yield
    library.library.cache_clear()


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
    found = loops.group_mass(tiles_of(codes), query, scales, bits, tokens, group_tokens)
    expected = expected_mass(query * scales, codes, bits, tokens, group_tokens)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert float(found.sum()) == pytest.approx(heads, rel=1e-4)


@compiled
def test_chosen_tiles_are_scored_as_if_there_were_no_others() -> None:
    codes = torch.randint(0, 256, (24, 1024), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    query, scales, chosen = noise(9, 48), noise(48, seed=2).abs(), np.array([1, 2, 9, 13])
    found = loops.group_mass(tiles_of(codes), query, scales, 4, 896, 4, chosen)
    alone = torch.cat([codes[:, tile * 64 : tile * 64 + 64] for tile in chosen], 1)
    assert torch.equal(found, loops.group_mass(tiles_of(alone), query, scales, 4, 256, 4))
    short = loops.group_mass(tiles_of(codes), query, scales, 4, 880, 4, chosen)  # the last tile has 48 tokens
    assert short.shape == (60,) and float(short.sum()) == pytest.approx(9, rel=1e-4)
    with pytest.raises(AssertionError):
        loops.group_mass(tiles_of(codes), query, scales, 4, 832, 4, chosen)


@compiled
@pytest.mark.parametrize("bits", [2, 4])
def test_tiles_promise_what_their_best_token_does(bits: int) -> None:
    codes = torch.randint(0, 256, (6, 640), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    query = noise(5, 48 // bits) * 0.3
    found = loops.tile_mass(tiles_of(codes), query, torch.ones(48 // bits), bits, 640)
    step = query.abs().amax(1, keepdim=True) / 127
    levels = unpack(codes, bits).float() - (1 << (bits - 1))
    best = ((query / step).round() @ levels * step).unflatten(1, (-1, 64)).amax(2)
    assert torch.allclose(found, torch.softmax(best, -1).sum(0), rtol=1e-3, atol=1e-6)


@compiled
def test_what_lies_past_the_last_token_does_not_count() -> None:
    codes = torch.full((48, 256), 0x77, dtype=torch.uint8)
    codes[:, 72:] = 0xFF
    found = loops.group_mass(tiles_of(codes), noise(3, 96).abs(), torch.ones(96), 4, 72, 4)
    assert torch.allclose(found, torch.full((18,), 3 / 18))


@compiled
def test_a_query_of_zeros_sees_all_tokens_alike() -> None:
    codes = torch.randint(0, 256, (8, 256), dtype=torch.uint8)
    found = loops.group_mass(tiles_of(codes), torch.zeros(2, 16), torch.ones(16), 4, 64, 4)
    assert torch.allclose(found, torch.full((16,), 2 / 16))


@compiled
@pytest.mark.parametrize("count", [1, 7, 50, 200])
def test_best_groups_with_many_equals(count: int) -> None:
    scores = torch.randint(0, 12, (150,), generator=torch.Generator().manual_seed(3)).float()
    picked = np.full(count, -1, np.int64)
    found = loops.top_groups(scores, 20, 140, picked)
    assert found == min(count, 120)
    best = sorted(range(20, 140), key=lambda group: (-scores[group], group))[:count]
    assert picked[:found].tolist() == sorted(best)
    assert (picked[found:] == -1).all()


@compiled
@pytest.mark.parametrize("count", [3, 5, 8])
def test_best_groups_where_most_have_nothing(count: int) -> None:
    scores = torch.zeros(100)
    scores[[7, 31, 32, 90, 99]] = torch.tensor([0.5, 0.2, 0.9, 0.1, 0.4])
    picked = np.full(count, -1, np.int64)
    assert loops.top_groups(scores, 2, 100, picked) == count
    best = sorted(range(2, 100), key=lambda group: (-scores[group], group))[:count]
    assert picked.tolist() == sorted(best)


@compiled
def test_no_range_has_no_groups() -> None:
    assert loops.top_groups(torch.ones(4), 3, 2, np.zeros(2, np.int64)) == 0


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_where_there_is_a_compiler_the_loops_are_compiled() -> None:
    assert loops.available()


def test_without_the_library_nothing_is_scored_here(reloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not loops.available()
    assert not loops.scores_here(4, 4, torch.device("cpu"))


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
