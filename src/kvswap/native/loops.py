"""What callers see of the compiled loops over tensors: scoring, choosing, gathering.

Each has a twin in plain torch, which is used on other devices and where nothing was compiled; callers ask first
(``scores_here``, ``converts_here``, ``available``). Calls release the GIL.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.native.library import available as available
from kvswap.native.library import library

TILE_TOKENS = 64
MAX_CODE_BITS = 4
COARSE_ROWS = 32


def scores_here(bits: int, group_tokens: int, device: torch.device) -> bool:
    """Whether ``group_mass`` can score such codes."""
    return device.type == "cpu" and bits <= MAX_CODE_BITS and TILE_TOKENS % group_tokens == 0 and available()


def scratch_token_bytes(heads: int, group_tokens: int) -> int:
    """What ``group_mass`` takes for a token in passing, rounded up; what does not grow with tokens is below 64 KiB."""
    return -(-4 * (heads * (TILE_TOKENS // group_tokens + 1) + TILE_TOKENS // group_tokens) // TILE_TOKENS)


def group_mass(
    codes: torch.Tensor,
    query: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    tokens: int,
    group_tokens: int,
    tiles: NDArray[np.int64] | None = None,
) -> torch.Tensor:
    """Estimated attention mass of each group, as ``kvswap.predict.mass.group_mass`` has it, from packed codes.

    Parameters
    ----------
    codes
        ``[tiles, R * bits / 8, 64]`` uint8, rows contiguous; whole groups, ``tokens`` (a multiple of G) of them count.
    query, scales
        ``[H_q, R]`` and ``[R]`` float32: their product is rounded to 8 bits.
    tiles
        Score these runs of 64 tokens alone (ascending), as if there were no others.

    Returns
    -------
    ``[tokens / G]`` float32, or ``[n]`` for the groups of the ``tiles``.
    """
    heads, rank = query.shape
    count = -(-tokens // TILE_TOKENS)
    assert codes.stride()[1:] == (TILE_TOKENS, 1) and len(codes) >= count
    if tiles is not None:
        assert len(tiles) and int(tiles[0]) >= 0 and int(tiles[-1]) < count
        tiles = np.ascontiguousarray(tiles)
        tokens = min((len(tiles) - 1) * TILE_TOKENS + tokens - int(tiles[-1]) * TILE_TOKENS, len(tiles) * TILE_TOKENS)
        count = len(tiles)
    floats = heads * (count * (TILE_TOKENS // group_tokens + 1) + 1) + -(-(heads + TILE_TOKENS) * rank // 2)
    scratch, mass = torch.empty(floats), torch.empty(tokens // group_tokens)
    compiled = library()
    assert compiled is not None
    query, scales = query.contiguous(), scales.contiguous()
    compiled.kvswap_group_mass(
        codes.data_ptr(),
        codes.stride(0),
        codes.shape[1],
        bits,
        query.data_ptr(),
        scales.data_ptr(),
        heads,
        tokens,
        group_tokens,
        None if tiles is None else tiles.ctypes.data,
        scratch.data_ptr(),
        mass.data_ptr(),
    )
    return mass


def tile_mass(codes: torch.Tensor, query: torch.Tensor, scales: torch.Tensor, bits: int, tokens: int) -> torch.Tensor:
    """What tiles of 64 tokens promise, ``[tokens / 64]`` float32: every head's best logit, softmax over tiles, summed.

    The arguments are those of ``group_mass``; ``tokens`` is a multiple of 64, R at most ``COARSE_ROWS``.
    """
    heads, rank = query.shape
    tiles = tokens // TILE_TOKENS
    assert rank <= COARSE_ROWS
    assert tokens % TILE_TOKENS == 0
    assert codes.stride()[1:] == (TILE_TOKENS, 1) and len(codes) >= tiles
    scratch = torch.empty(heads * (tiles + 1) + -(-(heads + TILE_TOKENS) * rank // 2))
    mass = torch.empty(tiles)
    compiled = library()
    assert compiled is not None
    query, scales = query.contiguous(), scales.contiguous()
    compiled.kvswap_tile_mass(
        codes.data_ptr(),
        codes.stride(0),
        codes.shape[1],
        bits,
        query.data_ptr(),
        scales.data_ptr(),
        heads,
        tokens,
        scratch.data_ptr(),
        mass.data_ptr(),
    )
    return mass


def top_groups(scores: torch.Tensor, first: int, end: int, picked: NDArray[np.int64]) -> int:
    """Write the best groups of ``[first, end)`` into ``picked``, ascending, as many as it holds; returns how many.

    ``scores`` ``[N]`` float32 on the CPU, contiguous.
    """
    compiled = library()
    assert compiled is not None
    assert scores.dtype == torch.float32 and scores.is_contiguous() and end <= len(scores)
    scratch = torch.empty(max(0, end - first))
    found: int = compiled.kvswap_top_groups(
        scores.data_ptr(), first, max(first, end), len(picked), scratch.data_ptr(), picked.ctypes.data
    )
    return found


def converts_here(stored: torch.dtype, wanted: torch.dtype, device: torch.device) -> bool:
    """Whether ``gather`` and ``put_tokens`` can turn stored elements into those of the model and back."""
    known = stored in (torch.float16, torch.bfloat16) and wanted == torch.float32
    return known and device.type == "cpu" and available()


def gather(slots: torch.Tensor, index: NDArray[np.int64], shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Groups in slots as K, V in order of tokens, ``[2, H_kv, n * G, d]`` float32.

    Parameters
    ----------
    slots
        ``[slots, slot_elements]`` float16 or bfloat16 on the CPU, contiguous rows.
    index
        ``[n]``: slots to take, in order.
    shape
        ``(2, H_kv, G, d)`` of a group, which its slot begins with.
    """
    compiled = library()
    assert compiled is not None
    _, heads, group_tokens, head_dim = shape
    assert slots.stride(1) == 1 and 2 * heads * group_tokens * head_dim <= slots.shape[1]
    assert len(index) == 0 or (int(index.min()) >= 0 and int(index.max()) < len(slots))
    index = np.ascontiguousarray(index)
    result = torch.empty(2, heads, len(index) * group_tokens, head_dim)
    compiled.kvswap_gather(
        slots.data_ptr(),
        slots.stride(0),
        index.ctypes.data,
        len(index),
        heads,
        group_tokens * head_dim,
        int(slots.dtype == torch.bfloat16),
        result.data_ptr(),
    )
    return result


def put_tokens(
    slots: torch.Tensor,
    homes: NDArray[np.int64],
    offsets: NDArray[np.int64],
    shape: tuple[int, int, int, int],
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """One token of each sequence into its group: K, V ``[B, H_kv, 1, d]`` float32, ``homes`` and ``offsets`` ``[B]``.

    ``slots`` and ``shape`` are those of ``gather``. What float16 cannot hold becomes its largest or smallest.
    """
    compiled = library()
    assert compiled is not None
    _, heads, group_tokens, head_dim = shape
    assert keys.dtype == values.dtype == torch.float32 and keys.stride(3) == values.stride(3) == 1
    strides = np.array([*keys.stride()[:2], *values.stride()[:2]], np.int64)
    known = compiled.kvswap_put_tokens(
        slots.data_ptr(),
        len(slots),
        slots.stride(0),
        homes.ctypes.data,
        offsets.ctypes.data,
        len(homes),
        heads,
        group_tokens,
        head_dim,
        int(slots.dtype == torch.bfloat16),
        keys.data_ptr(),
        values.data_ptr(),
        strides.ctypes.data,
    )
    assert known, "slots or places in a group that are not there"
