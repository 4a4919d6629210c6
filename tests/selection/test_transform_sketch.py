"""Transform codes: precision goes where queries look, every digit helps, and what is dumped comes back."""

from __future__ import annotations

import pytest
import torch

from kvswap.native import loops
from kvswap.selection import transform_sketch as transform
from kvswap.selection.basis import TRANSFORM, Basis, KeyCovariance, rotation
from kvswap.selection.sketch import LayerSketch
from kvswap.selection.transform_sketch import TransformSketch, basis_bytes, transform_basis

KV_HEADS, HEAD_DIM, TOKENS = 2, 16, 600
ELEMENTS = KV_HEADS * HEAD_DIM
CPU = torch.device("cpu")
compiled = pytest.mark.skipif(not loops.available(), reason="no compiled loops: there was no C compiler")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SPREAD = torch.logspace(0.5, -1.5, HEAD_DIM)[torch.randperm(HEAD_DIM, generator=torch.Generator().manual_seed(3))]
MEAN = 3 * noise(KV_HEADS, 1, HEAD_DIM, seed=9)


def keys(tokens: int, seed: int) -> torch.Tensor:
    """Keys ``[H_kv, tokens, d]`` with a mean and directions of very different variance."""
    return noise(KV_HEADS, tokens, HEAD_DIM, seed=seed) * SPREAD + MEAN


def queries(count: int, seed: int, looks_at: slice = slice(None)) -> torch.Tensor:
    """Queries ``[2 * H_kv, count, d]`` that look at some dimensions only."""
    found = torch.zeros(2 * KV_HEADS, count, HEAD_DIM)
    found[..., looks_at] = noise(2 * KV_HEADS, count, HEAD_DIM, seed=seed)[..., looks_at]
    return found


def statistics(looks_at: slice = slice(None)) -> KeyCovariance:
    found = KeyCovariance(KV_HEADS, HEAD_DIM)
    found.add(keys(4000, seed=1).transpose(0, 1))
    found.add_queries(queries(500, seed=2, looks_at=looks_at))
    return found


def sketch(basis: Basis, bits: int, kind: type[LayerSketch] = TransformSketch) -> LayerSketch:
    layer = kind(
        batch=1, kv_heads=KV_HEADS, head_dim=HEAD_DIM, basis=basis, bits=bits, capacity_tokens=TOKENS, device=CPU
    )
    layer.append(0, keys(TOKENS, seed=5))
    return layer


def error(layer: LayerSketch, looks_at: slice = slice(None)) -> float:
    """Mean square error of logits of unseen queries, a constant of each head aside, as a share of their variance."""
    query = queries(30, seed=6, looks_at=looks_at)
    wrong = right = 0.0
    for n in range(30):
        exact = (query[:, n].view(KV_HEADS, 2, -1) @ keys(TOKENS, seed=5).transpose(1, 2)).view(2 * KV_HEADS, TOKENS)
        found = layer.logits(query[None, :, n], 1.0)[0, :, :TOKENS]
        difference = found - exact
        wrong += float((difference - difference.mean(1, keepdim=True)).square().sum())
        right += float((exact - exact.mean(1, keepdim=True)).square().sum())
    return wrong / right


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_all_digits_give_nearly_exact_logits(bits):
    basis = transform_basis(statistics(), ELEMENTS * 8 // bits, bits)
    assert basis.kind == TRANSFORM and basis.matrix.shape == (2 * ELEMENTS, ELEMENTS * 8 // bits)
    assert error(sketch(basis, bits)) < 0.01


def test_every_digit_helps_and_wide_directions_get_more():
    errors = [error(sketch(transform_basis(statistics(), rows, 2), 2)) for rows in (8, 16, 32, 64)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02 < errors[0]
    rows = transform_basis(statistics(), 24, 2).rows
    assert rows is not None
    bits, digits = rows[-2:]
    assert bits.max() > bits.min() == 2 and set(digits.tolist()) == set(range(int(bits.max()) // 2))


def test_better_than_leading_directions_of_as_many_bytes():
    plain = sketch(Basis(statistics().leading(16) @ rotation(16), "leading"), 4, LayerSketch)
    ours = sketch(transform_basis(statistics(), 24, 4), 4)  # what its scale and minimum take, in rows
    assert plain.token_bytes(16, 4) == ours.token_bytes(24, 4) == 12
    assert error(ours) < 0.5 * error(plain)


def test_precision_goes_where_queries_look():
    part = slice(10, 16)
    blind, seeing = (sketch(transform_basis(statistics(looks), 16, 2), 2) for looks in (slice(None), part))
    assert error(seeing, part) < 0.5 * error(blind, part)


def test_unseen_and_extreme_keys_are_clipped_and_finite():
    layer = sketch(transform_basis(statistics(), 32, 2), 2)
    layer.append(0, 1e4 * keys(8, seed=7))
    assert bool(layer.logits(queries(1, seed=8)[None, :, 0], 1.0)[0, :, : TOKENS + 8].isfinite().all())
    none = KeyCovariance(KV_HEADS, HEAD_DIM)  # nothing was counted
    assert bool(transform_basis(none, 32, 2).matrix.isfinite().all())


def test_dumped_codes_come_back():
    basis = transform_basis(statistics(), 32, 2)
    layer, query = sketch(basis, 2), queries(1, seed=8)[None, :, 0]
    codes, scales = layer.dump(0, 0, TOKENS)
    assert codes.shape == (8, TOKENS) and scales.shape == (0, TOKENS)  # it has none
    other = TransformSketch(
        batch=1, kv_heads=KV_HEADS, head_dim=HEAD_DIM, basis=basis, bits=2, capacity_tokens=16, device=CPU
    )
    other.restore(0, codes, scales)
    assert torch.equal(other.logits(query, 0.5), layer.logits(query, 0.5))
    assert layer.nbytes == 8 * layer.logits(query, 1.0).shape[-1]


@compiled
@pytest.mark.parametrize("bits", [2, 4])
def test_compiled_mass_is_that_of_the_logits(bits, monkeypatch):
    basis = transform_basis(statistics(), 32, bits)
    layer = TransformSketch(
        batch=2, kv_heads=KV_HEADS, head_dim=HEAD_DIM, basis=basis, bits=bits, capacity_tokens=TOKENS, device=CPU
    )
    layer.append(0, keys(TOKENS, seed=5))
    layer.append(1, keys(400, seed=6))
    query = torch.stack([queries(1, seed=seed)[:, 0] for seed in (8, 9)])
    found = layer.group_mass(query, 0.25, 4)
    assert found.shape == (2, TOKENS // 4) and not found[1, 100:].any()
    monkeypatch.setattr(loops, "available", lambda: False)
    monkeypatch.setattr(layer, "_integer", False)
    plain = layer.group_mass(query, 0.25, 4)[:, : TOKENS // 4]
    assert torch.allclose(found, plain, rtol=0.05, atol=1e-3)  # the compiled one rounds queries to 8 bits
    alone = TransformSketch(
        batch=1, kv_heads=KV_HEADS, head_dim=HEAD_DIM, basis=basis, bits=bits, capacity_tokens=TOKENS, device=CPU
    )
    alone.append(0, keys(400, seed=6))
    monkeypatch.undo()
    assert torch.equal(alone.group_mass(query[1:], 0.25, 4)[0], found[1, :100])


def test_a_basis_comes_back_from_one_matrix():
    basis = transform_basis(statistics(), 32, 2)
    other = Basis.split(basis.joined(), basis.kind)
    assert basis.rows is not None and other.rows is not None
    assert torch.equal(other.matrix, basis.matrix) and torch.equal(other.rows, basis.rows)
    assert other.nbytes == basis.nbytes == basis_bytes(ELEMENTS, 32)


def long_sketch(tokens, bits=4):
    basis = transform_basis(statistics(), 32, bits)
    layer = TransformSketch(
        batch=1, kv_heads=KV_HEADS, head_dim=HEAD_DIM, basis=basis, bits=bits, capacity_tokens=tokens, device=CPU
    )
    layer.append(0, keys(tokens, seed=5))
    return layer


@compiled
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tokens", [4096, 4096 + 36])
def test_two_levels_find_nearly_all_mass_that_one_finds(bits, tokens, monkeypatch):
    layer, found, best = long_sketch(tokens, bits), 0.0, 0.0
    for seed in range(20):
        query = 4 * queries(1, seed=seed)[None, :, 0]
        flat = layer.group_mass(query, 1.0, 4)[0]
        monkeypatch.setattr(transform, "FLAT_TOKENS", 2048)
        monkeypatch.setattr(transform, "FINE_TOKENS", 1024)
        monkeypatch.setattr(transform, "COARSE_SHARE", 2)  # of 16 bytes, for two heads
        two = layer.group_mass(query, 1.0, 4)[0]
        monkeypatch.undo()
        assert two.shape == flat.shape
        scored = two.nonzero()[:, 0]
        assert len(scored) <= (1024 + 64) // 4
        found += float(flat[two.topk(8).indices].sum())
        best += float(flat.topk(8).values.sum())
    assert found > 0.9 * best


@compiled
def test_two_levels_with_all_tiles_are_one(monkeypatch):
    layer, query = long_sketch(1000), queries(1, seed=8)[None, :, 0]
    flat = layer.group_mass(query, 1.0, 4)
    monkeypatch.setattr(transform, "FLAT_TOKENS", 512)
    monkeypatch.setattr(transform, "FINE_TOKENS", 960)  # the 15 whole tiles, and the begun one besides
    assert torch.allclose(layer.group_mass(query, 1.0, 4), flat, rtol=1e-4, atol=1e-7)


@compiled
def test_rows_of_most_weight_come_first_in_a_packed_token():
    rows = transform_basis(statistics(), 32, 4).rows
    assert rows is not None
    weights = rows[1] * transform_basis(statistics(), 32, 4).matrix[ELEMENTS:].float().norm(dim=0)
    assert weights.shape == (32,)
    layer, query = long_sketch(2048), queries(1, seed=8)[None, :, 0]
    low_rank = layer.low_rank(query, 1.0)[0] * rows[1]
    spread = low_rank.square().mean(0).view(2, 16).sum(0)  # bytes: both their digits
    assert spread[:4].mean() > 3 * spread[-8:].mean()
