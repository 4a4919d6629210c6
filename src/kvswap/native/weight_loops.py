"""Compiled products with matrices of weights that stay as a GGUF file has them, and their unpacking.

``weights`` calls them, and asks ``available`` first. Calls release the GIL and are shared out to the threads that
PyTorch uses. Arguments that do not fit raise ValueError. Any thread.
"""

from __future__ import annotations

import ctypes

import torch

from kvswap.native.library import available as available
from kvswap.native.library import library
from kvswap.native.threads import threaded_library

MAX_VECTORS = 8
"""Vectors in one product; ``weights.h`` has the same."""
KINDS = {1: "plain C", 2: "AVX2", 3: "AVX-VNNI", 4: "AVX-512 VNNI", 5: "NEON"}
"""Kinds of products; see ``weights_dot.c``."""
_ALIGNMENT_BYTES = 64


class Matrix(ctypes.Structure):
    """``kvswap_matrix`` of ``weights.h``: rows of packed blocks, or of floats."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("paired_rows", ctypes.c_int64),
        ("fine", ctypes.c_int64),
    )
    data: int
    type: int
    rows: int
    columns: int
    row_bytes: int
    paired_rows: int
    fine: int
    owner: torch.Tensor


def matrix_of(packed: torch.Tensor, kind: int, columns: int, paired_rows: int = 0, *, fine: bool = False) -> Matrix:
    """The matrix that lies in ``packed`` ``[rows, row bytes]`` uint8: type ``kind`` of GGUF, ``columns`` inputs.

    ``paired_rows`` is 0, or how many rows of a head lie in the order of pairs; products are in the order of halves.
    With ``fine``, vectors count with 16 bits instead of 8.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.stride(1) != 1 or packed.device.type != "cpu":
        raise ValueError(f"packed weights {packed.dtype} {tuple(packed.shape)} on {packed.device}")
    if packed.shape[1] != row_bytes(kind, columns):
        raise ValueError(f"rows of {packed.shape[1]} bytes for {columns} weights of type {kind}")
    if paired_rows < 0 or paired_rows % 2 or (paired_rows and len(packed) % paired_rows):
        raise ValueError(f"{len(packed)} rows in pairs of heads of {paired_rows}")
    matrix = Matrix(packed.data_ptr(), kind, len(packed), columns, packed.stride(0), paired_rows, fine)
    matrix.owner = packed  # keeps its memory alive
    return matrix


def multiplies(kind: int) -> bool:
    """Whether there are compiled products for this type of GGUF."""
    compiled = library()
    return compiled is not None and bool(compiled.kvswap_activation_kind(kind) >= 0)


def row_bytes(kind: int, columns: int) -> int:
    """Bytes of a row of ``columns`` weights, or -1 where the type is unknown or has blocks that do not divide it."""
    return int(threaded_library().kvswap_row_bytes(kind, columns))


def linear(matrix: Matrix, x: torch.Tensor, bias: torch.Tensor | None, *, products: int = 0) -> torch.Tensor:
    """``x`` ``[n, columns]`` times the matrix, plus ``bias`` ``[rows]``: ``[n, rows]``; all float32, n up to 8.

    ``products`` forces one of ``KINDS``; 0 is the best that this processor has.
    """
    count, compiled = len(x), threaded_library()
    if x.shape != (count, matrix.columns) or x.dtype != torch.float32 or not 1 <= count <= MAX_VECTORS:
        raise ValueError(f"vectors {tuple(x.shape)} {x.dtype} for a matrix with {matrix.columns} columns")
    if bias is not None and (bias.shape != (matrix.rows,) or bias.dtype != torch.float32 or not bias.is_contiguous()):
        raise ValueError(f"bias {tuple(bias.shape)} {bias.dtype} for a matrix with {matrix.rows} rows")
    x, y = x.contiguous(), torch.empty(count, matrix.rows)
    scratch = torch.empty(
        count * compiled.kvswap_activation_bytes(matrix.type, matrix.columns) + _ALIGNMENT_BYTES, dtype=torch.uint8
    )
    aligned = -(-scratch.data_ptr() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    known = compiled.kvswap_packed_linear(
        ctypes.addressof(matrix),
        x.data_ptr(),
        count,
        y.data_ptr(),
        None if bias is None else bias.data_ptr(),
        torch.get_num_threads(),
        aligned,
        products,
    )
    if not known:
        raise ValueError(f"this processor has no products of kind {products}")
    return y


def unpack(matrix: Matrix, first: int, last: int, out: torch.Tensor, *, products: int = 0) -> torch.Tensor:
    """Rows ``[first, last)`` as float32, into ``out`` ``[last - first, columns]``, which is returned."""
    if not 0 <= first <= last <= matrix.rows:
        raise ValueError(f"rows {first} to {last} of {matrix.rows}")
    if out.shape != (last - first, matrix.columns) or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"{tuple(out.shape)} {out.dtype} for {last - first} rows of {matrix.columns} weights")
    compiled = threaded_library()
    known = compiled.kvswap_unpack(
        ctypes.addressof(matrix), first, last, out.data_ptr(), torch.get_num_threads(), products
    )
    if not known:
        raise ValueError(f"this processor has no products of kind {products}")
    return out
