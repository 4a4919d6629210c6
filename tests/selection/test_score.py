"""Products with packed codes: unpacking is exact, the integer form is the float form to within its rounding."""

from __future__ import annotations

import pytest
import torch

from kvswap.selection.score import QUERY_LEVELS, float_products, integer_products, middle, prefers_integers, unpack

RANK, TOKENS, HEADS = 24, 512, 5


def packed_codes(bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes ``[RANK, TOKENS]`` and the bytes that hold them."""
    codes = torch.randint(0, 1 << bits, (RANK, TOKENS), generator=torch.Generator().manual_seed(bits))
    packed = torch.zeros(RANK * bits // 8, TOKENS, dtype=torch.int64)
    for k, part in enumerate(codes.split(len(packed))):
        packed |= part << (k * bits)
    return codes, packed.to(torch.uint8)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_unpack_gives_every_code_back(bits: int) -> None:
    codes, packed = packed_codes(bits)
    assert torch.equal(unpack(packed, bits).long(), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_products(bits: int, size: float) -> None:
    codes, packed = packed_codes(bits)
    query = size * torch.randn(HEADS, RANK, generator=torch.Generator().manual_seed(1))
    exact = query.double() @ (codes - middle(bits)).double()
    torch.testing.assert_close(float_products(query, packed, bits).double(), exact, rtol=0, atol=2e-3 * size)
    if not prefers_integers(bits, torch.device("cpu")):
        return
    rounding = query.abs().amax(1, keepdim=True).double() / QUERY_LEVELS / 2
    bound = rounding * (codes - middle(bits)).double().abs().sum(0)
    error = (integer_products(query, packed, bits).double() - exact).abs()
    assert (error <= bound * 1.001 + 1e-6 * size).all()
    assert error.max() > 0


def test_a_query_of_zeros_has_products_of_zero() -> None:
    if prefers_integers(4, torch.device("cpu")):
        assert not integer_products(torch.zeros(2, RANK), packed_codes(4)[1], 4).any()
