"""Statistics of a layer's keys after RoPE, and the bases of sketches that are made from them.

As in KVSwap (arXiv 2511.11907, section 3), the keys of all KV heads of a token are one row of D elements. The published
scheme keeps the directions of most variance (``KeyCovariance.leading``). kvswap's own basis comes from the same moments
and those of the queries (``transform_sketch.py``). Without a calibration, whole keys are rotated by a fixed orthogonal
matrix. Then all elements have about the same variance, and one scale for each token is enough, as for the activations
in QuaRot (arXiv 2404.00456).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TRANSFORM = "transform"
TRANSFORM_ROWS = 5
SCALE_BYTES = 4  # float16 scale and minimum of each token


@dataclass(frozen=True, slots=True)
class Basis:
    """``matrix`` is ``[D, R]`` float32 with orthonormal columns; ``kind`` is ``svd`` or ``identity``.

    Of kind ``transform`` it is ``[2 * D, R]`` float16, with five ``rows`` ``[5, R]`` float32, see
    ``kvswap.selection.transform_sketch``.
    """

    matrix: torch.Tensor
    kind: str
    rows: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.matrix.nbytes + (self.rows.nbytes if self.rows is not None else 0)

    def joined(self) -> torch.Tensor:
        """All of it as one float32 matrix, the rows last."""
        parts = [self.matrix.float()] + ([self.rows] if self.rows is not None else [])
        return torch.cat(parts)

    @classmethod
    def split(cls, matrix: torch.Tensor, kind: str) -> Basis:
        """What ``joined`` gave, exactly."""
        if kind != TRANSFORM:
            return cls(matrix, kind)
        return cls(matrix[:-TRANSFORM_ROWS].half(), kind, matrix[-TRANSFORM_ROWS:].contiguous())


class KeyCovariance:
    """Uncentred moments of one layer's keys, and second ones of the queries that each KV head gets.

    ``total`` ``[D]`` and ``matrix`` ``[D, D]`` are summed over ``count`` keys, ``queries`` ``[H_kv, d, d]`` over
    ``query_count`` queries a KV head; all float64.
    """

    def __init__(self, kv_heads: int, head_dim: int) -> None:
        self.matrix = torch.zeros(kv_heads * head_dim, kv_heads * head_dim, dtype=torch.float64)
        self.total = torch.zeros(kv_heads * head_dim, dtype=torch.float64)
        self.count = 0
        self.queries = torch.zeros(kv_heads, head_dim, head_dim, dtype=torch.float64)
        self.query_count = 0

    def add(self, keys: torch.Tensor) -> None:
        """Count keys ``[n, H_kv, d]`` of any float dtype."""
        rows = keys.reshape(keys.shape[0], -1).float().cpu()
        self.matrix += (rows.T @ rows).double()
        self.total += rows.double().sum(0)
        self.count += len(rows)

    def add_queries(self, queries: torch.Tensor) -> None:
        """Count queries ``[H_q, n, d]`` of any float dtype."""
        rows = queries.float().cpu().reshape(self.queries.shape[0], -1, queries.shape[-1])
        self.queries += (rows.transpose(1, 2) @ rows).double()
        self.query_count += rows.shape[1]

    def leading(self, rank: int) -> torch.Tensor:
        """The ``rank`` directions of most variance, ``[D, rank]`` float32, most first."""
        _, vectors = torch.linalg.eigh(self.matrix)
        leading = vectors.flip(1)[:, :rank].float()
        signs = torch.where(leading.abs().amax(0) == leading.amax(0), 1.0, -1.0)
        directions: torch.Tensor = (leading * signs).contiguous()  # the same sign everywhere
        return directions


def rotation(size: int) -> torch.Tensor:
    """A fixed random orthogonal matrix ``[size, size]``."""
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, r = torch.linalg.qr(noise)
    orthogonal: torch.Tensor = (q * r.diagonal().sign()).float()
    return orthogonal


def identity_basis(elements: int) -> Basis:
    """Whole keys, rotated: needs no calibration. R = D."""
    return Basis(rotation(elements), "identity")
