"""Compiled loops over tensors on the CPU: score groups, choose the best, gather them, store new tokens.

``selection``, ``memory`` and ``store`` call them, and use torch on other devices and where nothing was compiled; they
ask first (``scores_here``, ``converts_here``, ``available``). Calls release the GIL. Arguments that would reach outside
the tensors raise ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.native.library import available as available
from kvswap.native.threads import threaded_library
from kvswap.terms import FLOAT16_MAX

SCORE_TILE_TOKENS = 64
"""Tokens whose codes lie together and are scored together; ``kernels.c`` has the same."""
MAX_CODE_BITS = 4
ATTEND_BLOCK_TOKENS = 64
"""Most tokens of a group that ``attend_groups`` takes; ``tiles.c`` has the same."""
COARSE_ROWS = 32
GRAIN = 32768
"""Logits or elements from which a loop is shared out to threads: about ten microseconds of work, as in PyTorch."""


def scores_here(bits: int, group_tokens: int, device: torch.device) -> bool:
    """Whether ``group_mass`` can score such codes."""
    return device.type == "cpu" and bits <= MAX_CODE_BITS and SCORE_TILE_TOKENS % group_tokens == 0 and available()


def scratch_token_bytes(heads: int, group_tokens: int) -> int:
    """Scratch of ``group_mass`` for a token, rounded up; what does not grow with tokens is below 64 KiB."""
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
    """Estimated attention mass of each group, as ``kvswap.selection.choose.group_mass`` has it, from packed codes.

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
        Of one sequence, score only these tiles of 64 tokens (ascending), as if there were no others.
    kind
        How products are made: by words (1), by two bytes (2), by four (3), or the fastest of this processor (0).

    Returns
    -------
    ``[B, N]`` float32, zero past a sequence's end; N are the groups of the longest, or those of the ``tiles``.
    """
    batch, heads, rank = query.shape
    if codes.stride()[2:] != (SCORE_TILE_TOKENS, 1) or rank != codes.shape[2] * 8 // bits:
        raise ValueError(f"codes {tuple(codes.shape)} of {bits} bits do not fit queries of rank {rank}")
    if codes.shape[1] * SCORE_TILE_TOKENS < int(tokens.max()):
        raise ValueError(f"{int(tokens.max())} tokens in {codes.shape[1]} tiles")
    if tiles is not None:
        if batch != 1:
            raise ValueError(f"tiles are chosen for one sequence, not for {batch}")
        tiles, tokens = _of_tiles(tiles, int(tokens[0]))
    longest = int(tokens.max())
    count = -(-longest // SCORE_TILE_TOKENS)
    workers, compiled = _workers(batch * longest * heads), threaded_library()
    floats = compiled.kvswap_scratch_floats(codes.shape[2], bits, heads, count, group_tokens, batch, workers)
    scratch, mass = torch.empty(floats), torch.empty(batch, longest // group_tokens)
    query, scales, tokens = query.contiguous(), scales.contiguous(), np.ascontiguousarray(tokens, np.int64)
    layout = codes.data_ptr(), *codes.stride()[:2], codes.shape[2], bits, query.data_ptr(), scales.data_ptr()
    chosen = None if tiles is None else tiles.ctypes.data
    sizes = batch, heads, tokens.ctypes.data, group_tokens, chosen, kind, workers
    known = compiled.kvswap_group_mass(*layout, *sizes, scratch.data_ptr(), mass.data_ptr(), mass.shape[1])
    if not known:
        raise ValueError(f"this processor has no products of kind {kind}")
    return mass


def _workers(work: int) -> int:
    return torch.get_num_threads() if work >= GRAIN else 1


def _of_tiles(tiles: NDArray[np.int64], tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Some tiles of a sequence as C takes them, and ``[1]`` how many tokens they hold: the last may not be full."""
    if not len(tiles) or int(tiles[0]) < 0 or int(tiles[-1]) * SCORE_TILE_TOKENS >= tokens:
        raise ValueError(f"tiles outside a sequence of {tokens} tokens")
    rest = min(SCORE_TILE_TOKENS, tokens - int(tiles[-1]) * SCORE_TILE_TOKENS)
    return np.ascontiguousarray(tiles, np.int64), np.array([(len(tiles) - 1) * SCORE_TILE_TOKENS + rest])


def tile_mass(codes: torch.Tensor, query: torch.Tensor, scales: torch.Tensor, bits: int, tokens: int) -> torch.Tensor:
    """Coarse scores of tiles of 64 tokens, ``[tokens / 64]`` float32: best logit by head, softmax over tiles, summed.

    The arguments are those of ``group_mass`` for one sequence, without B; ``tokens`` is a multiple of 64, R at most
    ``COARSE_ROWS``.
    """
    heads, rank = query.shape
    tiles = tokens // SCORE_TILE_TOKENS
    if rank > COARSE_ROWS or rank != codes.shape[1] * 8 // bits or codes.stride()[1:] != (SCORE_TILE_TOKENS, 1):
        raise ValueError(f"codes {tuple(codes.shape)} of {bits} bits do not fit coarse queries of rank {rank}")
    if tokens % SCORE_TILE_TOKENS or len(codes) < tiles:
        raise ValueError(f"{tokens} tokens are not whole tiles of {len(codes)}")
    compiled = threaded_library()
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
    """The ``count`` best groups of ``[first, ends[b])`` in each row, ascending, filled up with N.

    ``scores`` ``[B, N]`` float32 on the CPU, contiguous; returns ``[B, count]``.
    """
    rows, groups = scores.shape
    limits = np.ascontiguousarray(ends, np.int64)
    if scores.dtype != torch.float32 or not scores.is_contiguous() or len(limits) != rows:
        raise ValueError(f"scores {tuple(scores.shape)} {scores.dtype} with {len(limits)} ends")
    if first < 0 or int(limits.max()) > groups:
        raise ValueError(f"groups from {first} to {int(limits.max())} of {groups}")
    scratch, picked = torch.empty(max(1, groups)), np.empty((rows, count), np.int64)
    compiled = threaded_library()
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


def converts_here(stored: torch.dtype, computed: torch.dtype, device: torch.device) -> bool:
    """Whether ``gather`` and ``put_tokens`` can convert stored elements to the model's dtype and back."""
    known = stored in (torch.float16, torch.bfloat16) and computed == torch.float32
    return known and device.type == "cpu" and available()


def within_float16(values: torch.Tensor) -> torch.Tensor:
    """Values cut to what float16 holds. Infinities stay: no sound model has one, and storing it is refused."""
    return torch.where(values.isinf(), values, values.clamp(-FLOAT16_MAX, FLOAT16_MAX))


def gather(
    slots: torch.Tensor, index: NDArray[np.int64], shape: tuple[int, int, int, int], out: torch.Tensor | None = None
) -> torch.Tensor:
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
    out
        Contiguous float32 for all elements, which the result is a view of; None takes new memory.
    """
    compiled = threaded_library()
    _, heads, group_tokens, head_dim = shape
    batch, count = index.shape
    if slots.stride(1) != 1 or 2 * heads * group_tokens * head_dim > slots.shape[1]:
        raise ValueError(f"slots {tuple(slots.shape)} do not hold groups {shape}")
    index = np.ascontiguousarray(index, np.int64)
    size = (2, batch, heads, count * group_tokens, head_dim)
    if out is not None and (out.dtype != torch.float32 or out.device.type != "cpu" or not out.is_contiguous()):
        raise ValueError(f"memory for the result is {out.dtype} on {out.device}, which must be contiguous float32")
    result = torch.empty(size) if out is None else out.view(size)
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
    if not known:
        raise ValueError(f"a slot that is not among the {len(slots)}")
    return result


def attends_here(stored: torch.dtype, group_tokens: int, device: torch.device) -> bool:
    """Whether ``attend_groups`` can attend to groups that are stored so."""
    return converts_here(stored, torch.float32, device) and group_tokens <= ATTEND_BLOCK_TOKENS


def attend_groups(
    slots: torch.Tensor,
    index: NDArray[np.int64] | None,
    shape: tuple[int, int, int, int],
    query: torch.Tensor,
    peak: torch.Tensor,
    total: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Add the tokens of whole groups, as they are stored, to an attention that is on its way, in place.

    For few queries: with many, products of whole matrices are faster. Shared out to the threads that PyTorch uses.

    Parameters
    ----------
    slots, shape
        As for ``gather``.
    index
        ``[n]``: slots to take, in any order; None takes all.
    query
        ``[H_kv, rows, d]`` float32, scaled.
    peak, total, output
        ``[H_kv, rows, 1]`` twice and ``[H_kv, rows, d]`` float32: the largest logit so far, the sum of exponentials
        against it, and that of exponentials times values; -inf, 0 and 0 before the first tokens.
    """
    compiled = threaded_library()
    _, heads, group_tokens, head_dim = shape
    rows = query.shape[1]
    states = {"query": (query, head_dim), "peak": (peak, 1), "total": (total, 1), "output": (output, head_dim)}
    for name, (each, width) in states.items():
        if each.shape != (heads, rows, width) or each.dtype != torch.float32 or not each.is_contiguous():
            raise ValueError(f"{name} {tuple(each.shape)} {each.dtype} for groups {shape} and {rows} rows")
    elements, sixteen_bit = 2 * heads * group_tokens * head_dim, slots.dtype in (torch.float16, torch.bfloat16)
    if slots.stride(1) != 1 or not sixteen_bit or elements > slots.shape[1]:
        raise ValueError(f"slots {tuple(slots.shape)} {slots.dtype} do not hold groups {shape}")
    index = np.arange(len(slots)) if index is None else np.ascontiguousarray(index, np.int64)
    workers = _workers(len(index) * rows * heads * group_tokens)
    scratch = torch.empty(compiled.kvswap_attending_floats(heads, rows, head_dim, workers))
    known = compiled.kvswap_attend_groups(
        slots.data_ptr(),
        len(slots),
        slots.stride(0),
        index.ctypes.data,
        len(index),
        heads,
        group_tokens,
        head_dim,
        int(slots.dtype == torch.bfloat16),
        query.data_ptr(),
        rows,
        workers,
        scratch.data_ptr(),
        peak.data_ptr(),
        total.data_ptr(),
        output.data_ptr(),
    )
    if not known:
        raise ValueError(
            f"a slot that is not among the {len(slots)}, or groups of more than {ATTEND_BLOCK_TOKENS} tokens"
        )


def put_tokens(
    slots: torch.Tensor,
    pinned: NDArray[np.int64],
    offsets: NDArray[np.int64],
    shape: tuple[int, int, int, int],
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """One token of each sequence into its group: K, V ``[B, H_kv, 1, d]`` float32, ``pinned`` and ``offsets`` ``[B]``.

    ``pinned`` are slots, ``offsets`` places in a group; ``slots`` and ``shape`` are those of ``gather``. Values that
    float16 cannot hold become its largest or smallest; infinities stay.
    """
    compiled = threaded_library()
    _, heads, group_tokens, head_dim = shape
    if not keys.dtype == values.dtype == torch.float32 or not keys.stride(3) == values.stride(3) == 1:
        raise ValueError(f"keys {keys.dtype} and values {values.dtype}, which must be float32 with contiguous heads")
    strides = np.array([*keys.stride()[:2], *values.stride()[:2]], np.int64)
    known = compiled.kvswap_put_tokens(
        slots.data_ptr(),
        len(slots),
        slots.stride(0),
        pinned.ctypes.data,
        offsets.ctypes.data,
        len(pinned),
        heads,
        group_tokens,
        head_dim,
        int(slots.dtype == torch.bfloat16),
        keys.data_ptr(),
        values.data_ptr(),
        strides.ctypes.data,
    )
    if not known:
        raise ValueError(f"a slot that is not among the {len(slots)}, or a place outside a group of {group_tokens}")
