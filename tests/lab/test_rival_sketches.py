"""What each rival keeps of the keys, held against its formula written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvswap.config import Config
from kvswap.lab.rivals import find
from kvswap.lab.rivals.infinigen import strongest
from kvswap.lab.rivals.parts.decoding import groups_of_heads
from kvswap.lab.rivals.parts.heads import best_of_each, best_of_sum
from kvswap.selection.basis import KeyCovariance
from kvswap.selection.method import KeyFacts

HEADS, QUERIES, SIZE = 2, 4, 8


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turn(keys: torch.Tensor, positions: torch.Tensor, inverse: bool) -> torch.Tensor:
    """A rotation that depends on the position, as RoPE is."""
    angle = positions.to(keys.dtype) * (-0.1 if inverse else 0.1)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = keys.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def facts() -> KeyFacts:
    covariance = KeyCovariance(HEADS, SIZE)
    covariance.add(random(200, HEADS, SIZE, seed=5) * torch.arange(1, SIZE + 1))
    covariance.add_queries(random(QUERIES, 200, SIZE, seed=6) * torch.arange(SIZE, 0, -1))
    return KeyFacts(
        layers=1,
        query_heads=QUERIES,
        kv_heads=HEADS,
        head_dim=SIZE,
        device=torch.device("cpu"),
        statistics=[covariance],
        rotate=turn,
    )


def filled(name: str, keys: torch.Tensor, rank: int | None):
    method = find(name)
    config = method.configure(Config(sketch_rank=rank))
    (maker,) = method.makers(facts(), config)
    sketch = maker.make(1, 64)
    whole = keys.shape[1] // 2 // config.group_tokens * config.group_tokens
    sketch.append(0, keys[:, :whole])
    sketch.append(0, keys[:, whole:])
    assert sketch.tokens.tolist() == [keys.shape[1]]
    return sketch, method, config.group_tokens


@pytest.mark.parametrize("name", ["loki", "infinigen", "infinigen*"])
def test_at_full_rank_rows_give_the_true_logits(name: str) -> None:
    keys, query = random(HEADS, 96, SIZE), random(1, QUERIES, SIZE, seed=2)
    sketch, method, _ = filled(name, keys, HEADS * SIZE)
    scores = method.score(sketch, query, 1.0, 1)
    true = torch.einsum("hgd,htd->ht", query[0].view(HEADS, -1, SIZE), keys)
    expected = true.sum(0) if method.decode.shared_selection else true
    torch.testing.assert_close(scores[0, ..., :96], expected, rtol=0, atol=0.05)
    assert (scores[0, ..., 96:] == float("-inf")).all()


def test_loki_keeps_the_principal_directions_of_each_head() -> None:
    """Elements of large variance decide: the last ones, by the calibration."""
    keys, query = torch.zeros(HEADS, 32, SIZE), torch.ones(1, QUERIES, SIZE)
    keys[0, 3, SIZE - 1], keys[0, 4, 0] = 5, 50
    sketch, _, _ = filled("loki", keys, HEADS * 3)
    assert best_of_each(sketch, query, 1.0, 1)[0, 0].argmax() == 3


def test_infinigen_keeps_the_columns_with_the_largest_sums() -> None:
    strength = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])
    keys = torch.zeros(2, 10, 4)
    keys[0, :, 2], keys[1, :, 1], keys[1, 0, 3] = -0.5, 0.1, 0.5
    picked = strongest(torch.eye(4).expand(2, 4, 4), strength, 2, keys)
    assert picked.argmax(1).tolist() == [[0, 2], [1, 3]]


def test_joined_selection_adds_the_heads() -> None:
    keys, query = random(HEADS, 96, SIZE), random(1, QUERIES, SIZE, seed=2)
    sketch, _, _ = filled("infinigen*", keys, 8)
    torch.testing.assert_close(best_of_sum(sketch, query, 1.0, 1), best_of_each(sketch, query, 1.0, 1).sum(1))


def test_quest_bounds_every_logit_and_is_reached() -> None:
    keys, query = random(HEADS, 96, SIZE), random(1, QUERIES, SIZE, seed=2)
    sketch, method, group_tokens = filled("quest", keys, None)
    scores = method.score(sketch, query, 1.0, group_tokens)[0, :, :6]
    pages = keys.view(HEADS, 6, 16, SIZE)
    by_head = query[0].view(HEADS, -1, 1, SIZE)
    products = torch.maximum(by_head * pages.amin(2)[:, None], by_head * pages.amax(2)[:, None])
    torch.testing.assert_close(scores, products.sum(-1).sum(1), rtol=0, atol=0.05)
    logits = torch.einsum("hgd,hptd->hgpt", query[0].view(HEADS, -1, SIZE), pages).sum(1).amax(-1)
    assert (scores >= logits - 0.05).all()


def test_shadowkv_gives_keys_back_and_ranks_by_the_mean_key() -> None:
    keys, query = random(HEADS, 96, SIZE), random(1, QUERIES, SIZE, seed=2)
    sketch, method, group_tokens = filled("shadowkv", keys, HEADS * SIZE)
    groups = torch.tensor([[1, 5, 11]])
    expected = torch.cat([keys[:, g * 8 : g * 8 + 8] for g in (1, 5, 11)], 1)
    torch.testing.assert_close(sketch.keys(groups)[0], expected, rtol=0, atol=0.02)
    means = keys.view(HEADS, 12, 8, SIZE).mean(2)
    logits = torch.einsum("hgd,hnd->hgn", query[0].view(HEADS, -1, SIZE), means)
    scores = method.score(sketch, query, 1.0, group_tokens)
    torch.testing.assert_close(scores[0, :, :12], logits.softmax(-1).amax(1), rtol=0, atol=0.01)
    low, _, _ = filled("shadowkv", keys, 2)
    assert (low.keys(groups)[0] - expected).abs().max() > 0.3


@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 4), st.integers(1, 6))
def test_union_of_what_heads_select(seed: int, batch: int, heads: int, count: int) -> None:
    groups, first = 20, 2
    scores = random(batch, heads, groups, seed=seed)
    ends = [first + (seed + 7 * b) % (groups - first + 1) for b in range(batch)]
    union, votes = groups_of_heads(scores.clone(), first, ends, count)
    for b, end in enumerate(ends):
        wanted = [
            set((scores[b, h, first:end].topk(min(count, end - first)).indices + first).tolist()) for h in range(heads)
        ]
        real = union[b] < groups
        assert union[b][real].tolist() == sorted(set().union(*wanted))
        assert (np.diff(real.astype(int)) <= 0).all() and not votes[b][:, ~real].any()
        assert [set(union[b][votes[b, h]].tolist()) for h in range(heads)] == wanted
