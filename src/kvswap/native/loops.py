"""What callers see of the compiled loops over tensors: scoring, choosing, gathering.

Each has a twin in plain torch, which is used on other devices and where nothing was compiled; callers ask first
(``scores_here``, ``converts_here``, ``available``). Calls release the GIL.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.native.library import available as available
from kvswap.native.threads import threaded_library

SCORE_TILE_TOKENS = 64
"""Tokens whose codes lie together and are scored together; ``kernels.c`` has the same."""
MAX_CODE_BITS = 4
COARSE_ROWS = 32
GRAIN = 32768
"""Logits or elements from which on a loop is shared out: as in PyTorch, what takes some ten microseconds alone."""


def scores_here(bits: int, group_tokens: int, device: torch.device) -> bool:
    """Whether ``group_mass`` can score such codes."""
    return device.type == "cpu" and bits <= MAX_CODE_BITS and SCORE_TILE_TOKENS % group_tokens == 0 and available()


def scratch_token_bytes(heads: int, group_tokens: int) -> int:
    """What ``group_mass`` takes for a token in passing, rounded up; what does not grow with tokens is below 64 KiB."""
    return -(
        -4 * (heads * (SCORE_TILE_TOKENS // group_tokens + 1) + SCORE_TILE_TOKENS // group_tokens) // SCORE_TILE_TOKENS
    )


def group_mass(
    codes: torch.Tensor,
    query: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    tokens: NDArray[np.int64],
    group_tokens: int,
    tiles: NDArray[np.int64] | None = None,
    *,
    kind: int = 0,
) -> torch.Tensor:
    """Estimated attention mass of each group, as ``kvswap.selection.mass.group_mass`` has it, from packed codes.

    Shared out to the threads that PyTorch uses.

    Parameters
    ----------
    codes
        ``[B, tiles, R * bits / 8, 64]`` uint8, rows contiguous; whole groups.
    query, scales
        ``[B, H_q, R]`` and ``[R]`` float32: their product is rounded to 8 bits.
    tokens
        ``[B]``: how many count, multiples of G.
    tiles
        Of one sequence, score these runs of 64 tokens alone (ascending), as if there were no others.
    kind
        How products are made: by words (1), by two bytes (2), by four (3), or the best of what this processor can (0).

    Returns
    -------
    ``[B, N]`` float32, zero past a sequence's end; N are the groups of the longest, or those of the ``tiles``.
    """
    batch, heads, rank = query.shape
    assert codes.stride()[2:] == (SCORE_TILE_TOKENS, 1) and rank == codes.shape[2] * 8 // bits
    assert codes.shape[1] * SCORE_TILE_TOKENS >= int(tokens.max())
    if tiles is not None:
        assert batch == 1
        tiles, tokens = _of_tiles(tiles, int(tokens[0]))
    longest = int(tokens.max())
    count = -(-longest // SCORE_TILE_TOKENS)
    workers, compiled = _workers(batch * longest * heads), threaded_library()
    assert compiled is not None
    floats = compiled.kvswap_scratch_floats(codes.shape[2], bits, heads, count, group_tokens, batch, workers)
    scratch, mass = torch.empty(floats), torch.empty(batch, longest // group_tokens)
    query, scales, tokens = query.contiguous(), scales.contiguous(), np.ascontiguousarray(tokens, np.int64)
    layout = codes.data_ptr(), *codes.stride()[:2], codes.shape[2], bits, query.data_ptr(), scales.data_ptr()
    chosen = None if tiles is None else tiles.ctypes.data
    sizes = batch, heads, tokens.ctypes.data, group_tokens, chosen, kind, workers
    known = compiled.kvswap_group_mass(*layout, *sizes, scratch.data_ptr(), mass.data_ptr(), mass.shape[1])
    assert known, f"products of kind {kind}, which this processor has not"
    return mass


def _workers(work: int) -> int:
    return torch.get_num_threads() if work >= GRAIN else 1


def _of_tiles(tiles: NDArray[np.int64], tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Some tiles of a sequence as C takes them, and ``[1]`` how many tokens they hold: the last may be a begun one."""
    assert len(tiles) and int(tiles[0]) >= 0 and int(tiles[-1]) * SCORE_TILE_TOKENS < tokens
    rest = min(SCORE_TILE_TOKENS, tokens - int(tiles[-1]) * SCORE_TILE_TOKENS)
    return np.ascontiguousarray(tiles, np.int64), np.array([(len(tiles) - 1) * SCORE_TILE_TOKENS + rest])


def tile_mass(codes: torch.Tensor, query: torch.Tensor, scales: torch.Tensor, bits: int, tokens: int) -> torch.Tensor:
    """What tiles of 64 tokens promise, ``[tokens / 64]`` float32: every head's best logit, softmax over tiles, summed.

    The arguments are those of ``group_mass`` for one sequence, without B; ``tokens`` is a multiple of 64, R at most
    ``COARSE_ROWS``.
    """
    heads, rank = query.shape
    tiles = tokens // SCORE_TILE_TOKENS
    assert rank <= COARSE_ROWS and tokens % SCORE_TILE_TOKENS == 0 and rank == codes.shape[1] * 8 // bits
    assert codes.stride()[1:] == (SCORE_TILE_TOKENS, 1) and len(codes) >= tiles
    compiled = threaded_library()
    assert compiled is not None
    workers = _workers(tokens * heads)
    floats = compiled.kvswap_scratch_floats(codes.shape[1], bits, heads, tiles, SCORE_TILE_TOKENS, 1, workers)
    scratch, mass = torch.empty(floats), torch.empty(tiles)
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
        workers,
        scratch.data_ptr(),
        mass.data_ptr(),
    )
    return mass


def top_groups(
    scores: torch.Tensor, first: int, ends: Sequence[int] | NDArray[np.int64], count: int
) -> NDArray[np.int64]:
    """The ``count`` best groups of ``[first, ends[b])`` in each row, ascending, then N where there are no more.

    ``scores`` ``[B, N]`` float32 on the CPU, contiguous; returns ``[B, count]``.
    """
    rows, groups = scores.shape
    limits = np.ascontiguousarray(ends, np.int64)
    assert scores.dtype == torch.float32 and scores.is_contiguous() and len(limits) == rows
    assert first >= 0 and int(limits.max()) <= groups
    scratch, picked = torch.empty(max(1, groups)), np.empty((rows, count), np.int64)
    compiled = threaded_library()
    assert compiled is not None
    compiled.kvswap_top_groups(
        scores.data_ptr(),
        rows,
        groups,
        first,
        limits.ctypes.data,
        count,
        scratch.data_ptr(),
        picked.ctypes.data,
    )
    return picked


def converts_here(stored: torch.dtype, wanted: torch.dtype, device: torch.device) -> bool:
    """Whether ``gather`` and ``put_tokens`` can turn stored elements into those of the model and back."""
    known = stored in (torch.float16, torch.bfloat16) and wanted == torch.float32
    return known and device.type == "cpu" and available()


def gather(slots: torch.Tensor, index: NDArray[np.int64], shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Groups in slots as K, V in order of tokens, ``[2, B, H_kv, n * G, d]`` float32.

    Shared out to the threads that PyTorch uses.

    Parameters
    ----------
    slots
        ``[slots, slot_elements]`` float16 or bfloat16 on the CPU, contiguous rows.
    index
        ``[B, n]``: slots to take, in order.
    shape
        ``(2, H_kv, G, d)`` of a group, which its slot begins with.
    """
    compiled = threaded_library()
    assert compiled is not None
    _, heads, group_tokens, head_dim = shape
    batch, count = index.shape
    assert slots.stride(1) == 1 and 2 * heads * group_tokens * head_dim <= slots.shape[1]
    index = np.ascontiguousarray(index, np.int64)
    result = torch.empty(2, batch, heads, count * group_tokens, head_dim)
    known = compiled.kvswap_gather(
        slots.data_ptr(),
        len(slots),
        slots.stride(0),
        index.ctypes.data,
        batch,
        count,
        heads,
        group_tokens * head_dim,
        int(slots.dtype == torch.bfloat16),
        _workers(result.numel()),
        result.data_ptr(),
    )
    assert known, "slots that are not there"
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
    compiled = threaded_library()
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
