"""The sketch holds what it says, to within half a step of its codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvswap.selection.basis import SCALE_BYTES, Basis, KeyCovariance, identity_basis, rotation
from kvswap.selection.sketch import STEP_TOKENS, LayerSketch
from kvswap.terms import round_up

KV_HEADS, HEAD_DIM = 2, 16
ELEMENTS = KV_HEADS * HEAD_DIM
PLAIN = Basis(torch.eye(ELEMENTS), "identity")
"""Coordinates are kept as they are, so that they can be read back."""


def keys(tokens: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(KV_HEADS, tokens, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def sketch(basis: Basis, bits: int, *, batch: int = 1, capacity_tokens: int = 300) -> LayerSketch:
    return LayerSketch(
        batch=batch,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        basis=basis,
        bits=bits,
        capacity_tokens=capacity_tokens,
        device=torch.device("cpu"),
    )


def read_back(layer: LayerSketch) -> torch.Tensor:
    """Keys ``[T, D]`` as the sketch has them: logits of the unit vectors, H_q = D."""
    units = torch.eye(HEAD_DIM).repeat(KV_HEADS, 1)[None]
    return layer.logits(units, 1.0)[0, :, : int(layer.tokens[0])].T


def exact_logits(query: torch.Tensor, rows: torch.Tensor, scaling: float) -> torch.Tensor:
    """``[H_q, T]`` of ``query [H_q, d]`` and keys ``[H_kv, T, d]``."""
    repeated = rows.repeat_interleave(query.shape[0] // KV_HEADS, 0)
    return torch.einsum("hd,htd->ht", query, repeated) * scaling


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [0.01, 1.0, 300.0])
def test_codes_are_within_half_a_step(bits: int, size: float) -> None:
    layer = sketch(PLAIN, bits)
    layer.append(0, keys(200, size=size))
    rows = keys(200, size=size).transpose(0, 1).reshape(200, ELEMENTS)
    reach = rows.amax(1) - rows.amin(1)
    half_step = reach / ((1 << bits) - 1) / 2
    rounding = 2.0**-10 * (reach + rows.abs().amax(1))  # scale and minimum have 11 significant bits
    error = (read_back(layer) - rows).abs().amax(1)
    assert bool((error <= half_step + rounding).all())
    assert bool((error > 0.5 * half_step).any())


def test_constant_and_zero_keys_are_read_back() -> None:
    layer = sketch(PLAIN, 4)
    rows = torch.cat([torch.zeros(KV_HEADS, 1, HEAD_DIM), torch.full((KV_HEADS, 1, HEAD_DIM), -3.0)], 1)
    layer.append(0, rows)
    assert torch.allclose(read_back(layer), torch.tensor([[0.0], [-3.0]]).expand(2, ELEMENTS), atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_appending_in_parts_equals_the_whole(bits: int) -> None:
    """Also past the first capacity and in steps that are no multiple of anything."""
    whole, parts = sketch(PLAIN, bits), sketch(PLAIN, bits, capacity_tokens=1)
    rows = keys(700)
    whole.append(0, rows)
    for start, stop in ((0, 1), (1, 4), (4, 257), (257, 258), (258, 700)):
        parts.append(0, rows[:, start:stop])
    query = torch.randn(1, 6, HEAD_DIM, generator=torch.Generator().manual_seed(5))
    assert torch.equal(read_back(whole), read_back(parts))
    assert torch.equal(whole.logits(query, 0.25), parts.logits(query, 0.25))
    assert whole.tokens.tolist() == parts.tokens.tolist() == [700]


@pytest.mark.parametrize("heads", [KV_HEADS, 3 * KV_HEADS])
def test_whole_keys_in_8_bit_give_nearly_exact_logits(heads: int) -> None:
    layer = sketch(identity_basis(ELEMENTS), 8)
    rows = keys(300)
    layer.append(0, rows)
    query = torch.randn(1, heads, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    exact = exact_logits(query[0], rows, 0.25)
    found = layer.logits(query, 0.25)
    assert found.shape == (1, heads, 2 * STEP_TOKENS)
    assert found.dtype == torch.float32
    assert bool((found[0, :, 300:] == float("-inf")).all())
    assert float((found[0, :, :300] - exact).abs().max()) < 0.02 * float(exact.std())


def test_more_bits_are_better() -> None:
    query = torch.randn(1, 4, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    errors = []
    for bits in (2, 4, 8):
        layer = sketch(identity_basis(ELEMENTS), bits)
        layer.append(0, keys(300))
        errors.append(float((layer.logits(query, 1.0)[0, :, :300] - exact_logits(query[0], keys(300), 1.0)).std()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_sequences_are_apart_and_end_where_they_end() -> None:
    layer = sketch(PLAIN, 8, batch=3)
    lengths = (5, 40, 0)
    for sequence in (0, 1):  # nothing yet for the third
        layer.append(sequence, keys(lengths[sequence], seed=sequence))
    query = torch.randn(3, 4, HEAD_DIM, generator=torch.Generator().manual_seed(2))
    found = layer.logits(query, 0.5)
    assert found.shape == (3, 4, STEP_TOKENS)
    for sequence, tokens in enumerate(lengths):
        assert bool((found[sequence, :, tokens:] == float("-inf")).all())
        if tokens:
            alone = sketch(PLAIN, 8)
            alone.append(0, keys(tokens, seed=sequence))
            expected = alone.logits(query[sequence : sequence + 1], 0.5)[0, :, :tokens]
            assert torch.allclose(found[sequence, :, :tokens], expected, atol=1e-5)


def test_half_precision_keys_and_queries() -> None:
    layer = sketch(PLAIN, 8)
    layer.append(0, keys(20).bfloat16())
    found = layer.logits(torch.ones(1, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16), 1.0)
    assert torch.allclose(found[0, :, :20], keys(20).bfloat16().float().sum(2), atol=0.1)


@given(
    st.sampled_from([2, 4, 8]),
    st.sampled_from([8, 16, ELEMENTS]),
    st.integers(1, 3),
    st.integers(1, 1200),
    st.integers(1, 1200),
)
def test_bytes_are_what_was_reserved(bits: int, rank: int, batch: int, capacity_tokens: int, tokens: int) -> None:
    basis = Basis(rotation(ELEMENTS)[:, :rank].contiguous(), "svd")
    layer = sketch(basis, bits, batch=batch, capacity_tokens=capacity_tokens)
    assert layer.nbytes == batch * round_up(capacity_tokens, STEP_TOKENS) * LayerSketch.token_bytes(rank, bits)
    layer.append(batch - 1, keys(tokens))
    assert layer.nbytes == (
        batch * round_up(max(capacity_tokens, tokens), STEP_TOKENS) * LayerSketch.token_bytes(rank, bits)
    )
    assert layer.nbytes >= batch * tokens * (rank * bits // 8 + SCALE_BYTES)


def test_basis_keeps_the_directions_of_most_variance() -> None:
    random = torch.Generator().manual_seed(3)
    directions = rotation(ELEMENTS)[:8] * torch.logspace(0, 1.5, 8)[:, None]  # variances from 1 to 1,000
    inside = torch.randn(500, 8, generator=random) @ directions
    rows = inside + 0.001 * torch.randn(500, ELEMENTS, generator=random)
    statistics = KeyCovariance(KV_HEADS, HEAD_DIM)
    for part in rows.split(170):
        statistics.add(part.view(-1, KV_HEADS, HEAD_DIM))
    assert torch.allclose(statistics.matrix, rows.double().T @ rows.double(), rtol=1e-4, atol=1e-2)
    matrix = statistics.leading(8)
    assert matrix.shape == (ELEMENTS, 8)
    assert matrix.is_contiguous()
    assert torch.allclose(matrix.T @ matrix, torch.eye(8), atol=1e-5)
    lost = rows - rows @ matrix @ matrix.T
    assert float(lost.norm() / rows.norm()) < 0.002
    variances = (rows @ matrix).pow(2).mean(0)
    assert bool((variances[:-1] >= 0.99 * variances[1:]).all())  # most first


def test_basis_is_the_same_every_time() -> None:
    statistics = KeyCovariance(KV_HEADS, HEAD_DIM)
    statistics.add(keys(100).transpose(0, 1))
    assert torch.equal(statistics.leading(16), statistics.leading(16))
    assert torch.equal(identity_basis(ELEMENTS).matrix, identity_basis(ELEMENTS).matrix)


@pytest.mark.parametrize("size", [8, 192])
def test_rotation_is_orthogonal(size: int) -> None:
    assert torch.allclose(rotation(size) @ rotation(size).T, torch.eye(size), atol=1e-5)
