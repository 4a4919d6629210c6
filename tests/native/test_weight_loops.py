"""Compiled products and unpacking of packed weights, every type: against gguf's own and against each other."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from kvswap.native import weight_loops
from kvswap.weights.gguf_file import TYPES
from kvswap.weights.modules import from_pairs
from tests.helpers.packed import COMPILED, random_rows

pytestmark = pytest.mark.skipif(not weight_loops.available(), reason="nothing was compiled here")
NAMES = [TYPES[kind][0] for kind in COMPILED]


def kinds_here() -> list[int]:
    """The kinds of products that this processor has."""
    found = []
    matrix = weight_loops.matrix_of(random_rows(8, 4, 32), 8, 32)
    for products in weight_loops.KINDS:
        try:
            weight_loops.linear(matrix, torch.ones(1, 32), None, products=products)
            found.append(products)
        except ValueError:
            continue
    return found


def matrix_and_values(kind: int, rows: int, columns: int, paired_rows: int = 0, fine: bool = False):
    packed = random_rows(kind, rows, columns)
    matrix = weight_loops.matrix_of(packed, kind, columns, paired_rows, fine=fine)
    found = gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType(kind))
    return packed, matrix, torch.from_numpy(np.array(found, np.float32)).view(rows, columns)


@pytest.mark.parametrize("kind", COMPILED, ids=NAMES)
def test_unpacking_gives_the_bits_of_gguf(kind):
    _packed, matrix, values = matrix_and_values(kind, 37, 512)
    for products in kinds_here():
        for first, last in ((0, 37), (5, 6), (36, 37), (4, 4)):
            out = weight_loops.unpack(matrix, first, last, torch.empty(last - first, 512), products=products)
            assert torch.equal(out.view(torch.int32), values[first:last].contiguous().view(torch.int32))


@pytest.mark.parametrize("fine", [False, True], ids=["8 bits", "16 bits"])
@pytest.mark.parametrize("kind", COMPILED, ids=NAMES)
def test_all_kinds_of_products_give_the_same_bits(kind, fine):
    """So do rows that are shared out in another way, and vectors that come alone."""
    assert 1 in kinds_here()
    _packed, matrix, _values = matrix_and_values(kind, 75, 512, fine=fine)
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(1))
    plain = weight_loops.linear(matrix, x, None, products=1)
    for products in kinds_here():
        for count in range(1, 9):
            assert torch.equal(weight_loops.linear(matrix, x[:count], None, products=products), plain[:count])
    assert torch.equal(weight_loops.linear(matrix, x[3:4], None), plain[3:4])


@pytest.mark.parametrize("fine", [False, True], ids=["8 bits", "16 bits"])
@pytest.mark.parametrize("kind", COMPILED, ids=NAMES)
def test_products_are_within_the_rounding_of_the_input(kind, fine):
    """An input differs by at most half a level of its block's largest, or one of 256th parts; floats are exact."""
    _packed, matrix, values = matrix_and_values(kind, 75, 768, fine=fine)
    x = torch.randn(3, 768, generator=torch.Generator().manual_seed(2))
    bias = torch.randn(75, generator=torch.Generator().manual_seed(3))
    y = weight_loops.linear(matrix, x, bias)
    exact = x.double() @ values.double().T + bias
    block = {0: 1, 1: 1, 30: 1}.get(kind, 256 if TYPES[kind][1] == 256 else 32)
    step = x.abs().view(3, -1, block).amax(-1) / (127 * 256 if fine else 254) if block > 1 else torch.zeros(3, 768)
    reach = values.abs().view(75, -1, block).sum(-1)
    size = x.abs() @ values.abs().T  # floats are added in some order: 24 bits of what is added
    bound = step @ reach.T + 1e-6 * size
    assert ((y - exact).abs() <= bound).all()
    assert (y - exact).abs().max() > 0


@pytest.mark.parametrize("kind", COMPILED, ids=NAMES)
def test_rows_in_pairs_come_out_in_halves(kind):
    packed, matrix, values = matrix_and_values(kind, 64, 256, paired_rows=16)
    order = from_pairs(64, 16)
    assert order[:4].tolist() == [0, 2, 4, 6] and order[8:11].tolist() == [1, 3, 5]
    assert torch.equal(weight_loops.unpack(matrix, 3, 40, torch.empty(37, 256)), values[order][3:40])
    plain = weight_loops.matrix_of(packed[order], kind, 256)
    x = torch.randn(2, 256)
    assert torch.equal(weight_loops.linear(matrix, x, None), weight_loops.linear(plain, x, None))


@pytest.mark.parametrize("kind", COMPILED, ids=NAMES)
def test_what_is_not_finite_gives_no_number(kind):
    _packed, matrix, _values = matrix_and_values(kind, 8, 256)
    x = torch.zeros(3, 256)
    x[0, 3], x[1, 4] = float("nan"), float("inf")
    y = weight_loops.linear(matrix, x, None)
    assert not y[:2].isfinite().any()
    assert (y[2] == 0).all()


def test_largest_codes_do_not_overflow():
    """Every code at its limit and every input at its level: sums of integers have to stay exact."""
    for kind in COMPILED:
        packed = random_rows(kind, 4, 256)
        if TYPES[kind][1] == 1:
            continue
        view = packed.view(4, -1, TYPES[kind][2])
        for fill in (0xFF, 0x80, 0x7F, 0x00):
            view[:, :, 4 if kind != 14 else 0 : 208 if kind == 14 else None] = fill
            matrix = weight_loops.matrix_of(packed, kind, 256)
            x = torch.where(torch.arange(256) % 3 > 0, 1.0, -1.0)[None]
            results = [weight_loops.linear(matrix, x, None, products=products) for products in kinds_here()]
            values = torch.from_numpy(np.array(gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType(kind)))).view(
                4, 256
            )
            assert torch.allclose(results[0].double(), x.double() @ values.double().T, rtol=1e-4, atol=1e-3)
            assert all(torch.equal(each, results[0]) for each in results)


def test_arguments_that_do_not_fit_are_refused():
    packed = random_rows(8, 4, 64)
    for wrong in (packed[:, :-1], packed.float(), packed[0]):
        with pytest.raises(ValueError, match=r"packed weights|rows of"):
            weight_loops.matrix_of(wrong, 8, 64)
    with pytest.raises(ValueError, match="rows of"):
        weight_loops.matrix_of(packed, 99, 64)
    with pytest.raises(ValueError, match="in pairs"):
        weight_loops.matrix_of(packed, 8, 64, 3)
    matrix = weight_loops.matrix_of(packed, 8, 64)
    for x in (torch.ones(1, 63), torch.ones(9, 64), torch.ones(0, 64), torch.ones(1, 64).double()):
        with pytest.raises(ValueError, match="vectors"):
            weight_loops.linear(matrix, x, None)
    with pytest.raises(ValueError, match="bias"):
        weight_loops.linear(matrix, torch.ones(1, 64), torch.ones(5))
    with pytest.raises(ValueError, match="no products of kind 9"):
        weight_loops.linear(matrix, torch.ones(1, 64), None, products=9)
    for first, last, out in ((0, 5, torch.empty(5, 64)), (0, 2, torch.empty(3, 64)), (3, 2, torch.empty(0, 64))):
        with pytest.raises(ValueError, match="rows"):
            weight_loops.unpack(matrix, first, last, out)
