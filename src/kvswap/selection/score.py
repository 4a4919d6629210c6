"""Products of queries with packed codes: exact in float32, or in 8-bit integers where that is faster.

Codes are unsigned and packed dimension-major, ``8 / bits`` dimensions in a byte. Dimension ``k * rows + r`` is in the
k-th bits of row r. Unpacking to floats moves four times the bytes and multiplies at a quarter of the rate. So on a CPU
whose matrix library has integer kernels, each head's query is rounded to 7 bits. That adds about 1 % to the error that
4-bit codes have already. More bits would let the 16-bit partial sums of older processors saturate.
"""

from __future__ import annotations

import torch

QUERY_LEVELS = 63


def prefers_integers(bits: int, device: torch.device) -> bool:
    """Whether to use ``integer_products`` there: not for 8-bit codes, which are finer than the rounded query."""
    return bits < 8 and device.type == "cpu" and torch.backends.mkldnn.is_available() and hasattr(torch, "_int_mm")


def unpack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack ``[rows, T]`` uint8 to one code in each entry: ``[rows * 8 / bits, T]`` uint8."""
    if bits == 8:
        return codes
    rows, mask = codes.shape[0], (1 << bits) - 1
    result = codes.new_empty(rows * 8 // bits, codes.shape[1])
    for k, part in enumerate(result.split(rows)):
        if k == 0:
            torch.bitwise_and(codes, mask, out=part)
        else:
            torch.bitwise_right_shift(codes, k * bits, out=part)
            if (k + 1) * bits < 8:
                part &= mask
    return result


def float_products(query: torch.Tensor, codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Multiply ``query`` ``[H_q, R]`` float32 with codes ``[R * bits / 8, T]`` less the middle code: ``[H_q, T]``."""
    return torch.addmm(-middle(bits) * query.sum(1, keepdim=True), query, unpack(codes, bits).float())


def integer_products(query: torch.Tensor, codes: torch.Tensor, bits: int) -> torch.Tensor:
    """As ``float_products``, with each head's query rounded to 7 bits; ``bits`` is 2 or 4."""
    step = query.abs().amax(1, keepdim=True).clamp_(min=1e-30).div_(QUERY_LEVELS)
    rounded = (query / step).round_()
    products = torch._int_mm(rounded.to(torch.int8), unpack(codes, bits).view(torch.int8)).float()
    return products.sub_(rounded.sum(1, keepdim=True).mul_(middle(bits))).mul_(step)


def middle(bits: int) -> int:
    """The middle code. Subtracting it makes the effect of the query's rounding errors smallest."""
    return 1 << (bits - 1)
