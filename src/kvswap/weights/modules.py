"""Linear layers and embeddings whose weights stay packed, as a GGUF file has them.

``PackedLinear`` stands where a model has ``nn.Linear``. A few rows, as in a decode step, go to the compiled product,
which rounds the input to 8 bits by blocks. More rows, as in a prompt, are multiplied with weights that are unpacked for
it, exactly: a panel at a time, or once for many calls within ``exact``. Inference only; one thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from kvswap.errors import ModelError
from kvswap.native import weight_loops
from kvswap.native.processor import has_bfloat16
from kvswap.native.weight_loops import MAX_VECTORS, Matrix
from kvswap.weights.gguf_file import TYPES

_FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
PANEL_BYTES = 32 << 20
"""What one panel of unpacked weights takes at most."""


class PackedLinear(nn.Module):
    """``y = x W' + b`` with W packed.

    Parameters
    ----------
    weight
        ``[out_features, row bytes]`` uint8, on the CPU; kept, not copied.
    kind
        The type's number in GGUF.
    bias
        ``[out_features]`` float32.
    paired_rows
        0, or how many rows of a head lie in the order of pairs, as the format has q and k of Llama: outputs are in the
        order of halves, ``from_pairs``.
    fine
        Whether a few rows of input count with 16 bits instead of 8, which takes up to twice the time.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        kind: int,
        in_features: int,
        bias: torch.Tensor | None = None,
        *,
        paired_rows: int = 0,
        fine: bool = False,
    ) -> None:
        super().__init__()
        self.paired_rows, self.fine = paired_rows, fine
        self.in_features, self.out_features, self.kind = in_features, len(weight), kind
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._matrix = self._described() if weight_loops.multiplies(kind) else None
        self._exact, self._unpacked = False, cast(torch.Tensor | None, None)

    @property
    def matrix(self) -> Matrix:
        """Where the weights lie, for compiled code."""
        if self._matrix is None or self._matrix.data != self.weight.data_ptr():
            self._matrix = self._described()
        return self._matrix

    def _described(self) -> Matrix:
        return weight_loops.matrix_of(self.weight, self.kind, self.in_features, self.paired_rows, fine=self.fine)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in the dtype of ``x``."""
        rows = x.reshape(-1, self.in_features)
        if 0 < len(rows) <= MAX_VECTORS and not self._exact and weight_loops.multiplies(self.kind):
            y = weight_loops.linear(self.matrix, rows.float(), self.bias).to(x.dtype)
        elif self._unpacked is not None:
            y = _multiply(rows, self._unpacked, self.bias)
        else:
            y = self._by_panels(rows)
        return y.view(*x.shape[:-1], self.out_features)

    def unpack(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights ``[out_features, in_features]`` in ``dtype``: float32 is exact."""
        found = torch.empty(self.out_features, self.in_features, dtype=dtype)
        for first, last in _panels(self.out_features, self.in_features):
            found[first:last] = self._panel(first, last)
        return found

    def _by_panels(self, rows: torch.Tensor) -> torch.Tensor:
        y = torch.empty(len(rows), self.out_features, dtype=rows.dtype)
        for first, last in _panels(self.out_features, self.in_features):
            panel = self._panel(first, last).to(product_dtype(rows.dtype))
            y[:, first:last] = _multiply(rows, panel, None if self.bias is None else self.bias[first:last])
        return y

    def _panel(self, first: int, last: int) -> torch.Tensor:
        """Some rows as float32."""
        if weight_loops.multiplies(self.kind):
            return weight_loops.unpack(self.matrix, first, last, torch.empty(last - first, self.in_features))
        packed: torch.Tensor = self.weight
        if self.paired_rows:
            packed = packed[from_pairs(self.out_features, self.paired_rows)]
        return dequantise(packed[first:last], self.kind).view(last - first, self.in_features)

    def extra_repr(self) -> str:
        """What ``print`` shows of the layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


class PackedEmbedding(nn.Module):
    """A table of embeddings that stays packed; rows are unpacked when they are looked up, times ``scale``.

    ``weight`` is ``[num_embeddings, row bytes]`` uint8.
    """

    def __init__(
        self, weight: nn.Parameter, kind: int, embedding_dim: int, *, scale: float = 1.0, padding_idx: int | None = None
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.kind = len(weight), embedding_dim, kind
        self.padding_idx, self.scale = padding_idx, scale
        self.weight = weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``[...]`` token ids to ``[..., embedding_dim]`` float32."""
        return self.rows(ids.reshape(-1)).view(*ids.shape, self.embedding_dim) * self.scale

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the table without the scale, ``[n, embedding_dim]`` float32, for ``[n]`` ids."""
        each, place = torch.unique(ids, return_inverse=True)
        packed = self.weight[each]
        if not weight_loops.multiplies(self.kind):
            return dequantise(packed, self.kind)[place]
        matrix = weight_loops.matrix_of(packed, self.kind, self.embedding_dim)
        return weight_loops.unpack(matrix, 0, len(each), torch.empty(len(each), self.embedding_dim))[place]

    def unpack(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The whole table without the scale, ``[num_embeddings, embedding_dim]``."""
        found = torch.empty(self.num_embeddings, self.embedding_dim, dtype=dtype)
        for first, last in _panels(self.num_embeddings, self.embedding_dim):
            found[first:last] = self.rows(torch.arange(first, last))
        return found

    def extra_repr(self) -> str:
        """What ``print`` shows of the table."""
        return f"{self.num_embeddings}, {self.embedding_dim}, kind={self.kind}"


@contextmanager
def exact(module: nn.Module, *, keep: bool) -> Iterator[None]:
    """Within, the packed linear layers in ``module`` do not round their input, however few rows it has.

    ``keep`` unpacks their weights once for all calls; ``passing_bytes`` says what that takes.
    """
    layers = [each for each in module.modules() if isinstance(each, PackedLinear)]
    try:
        for each in layers:
            each._exact = True
            if keep:
                each._unpacked = each.unpack(product_dtype(torch.float32))
        yield
    finally:
        for each in layers:
            each._exact, each._unpacked = False, None


@contextmanager
def prompt_products(module: nn.Module, *, rows: int, keep: bool) -> Iterator[None]:
    """``exact`` for a prompt of ``rows`` rows in all its chunks, unless it is so short that its rows are rounded."""
    if rows <= MAX_VECTORS:
        yield
        return
    with exact(module, keep=keep):
        yield


def passing_bytes(modules: Iterable[nn.Module]) -> tuple[int, int]:
    """What ``exact`` takes at most, for one of these modules: with ``keep``, and without. 0 where none are packed."""
    kept = panel = 0
    for module in modules:
        sizes = [each.in_features * each.out_features for each in module.modules() if isinstance(each, PackedLinear)]
        kept = max(kept, sum(sizes) * product_dtype(torch.float32).itemsize)
        panel = max([panel, *(2 * min(PANEL_BYTES, 4 * size) for size in sizes)])
    return max(kept, panel), panel


def unpack_modules(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace packed layers by those of torch with unpacked weights in ``dtype``; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for path, module in list(model.named_modules()):
        if not isinstance(module, PackedLinear | PackedEmbedding):
            continue
        if id(module.weight) not in made:
            made[id(module.weight)] = nn.Parameter(module.unpack(dtype), requires_grad=False)
        weight = made[id(module.weight)]
        new: nn.Module = (
            _ScaledEmbedding(weight, module.scale) if isinstance(module, PackedEmbedding) else _linear(weight)
        )
        if isinstance(module, PackedLinear) and module.bias is not None:
            new.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
        model.set_submodule(path, new)


def unpacked_type(kind: int) -> int:
    """The type that weights have in memory: ``kind`` itself where it has compiled products, else one of floats."""
    if weight_loops.multiplies(kind):
        return kind
    return next(number for number, dtype in _FLOATS.items() if dtype == product_dtype(torch.float32))


def unpack_rows(packed: torch.Tensor, kind: int, columns: int) -> torch.Tensor:
    """Packed rows ``[n, row bytes]`` as those of ``unpacked_type(kind)``, uint8, made a panel at a time."""
    found = torch.empty(len(packed), columns, dtype=_FLOATS[unpacked_type(kind)])
    for first, last in _panels(len(packed), columns):
        found[first:last] = dequantise(packed[first:last], kind).view(last - first, columns)
    return found.view(torch.uint8)


def _linear(weight: nn.Parameter) -> nn.Linear:
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = weight
    return made


class _ScaledEmbedding(nn.Embedding):
    """Embeddings times a number, as in Gemma."""

    def __init__(self, weight: nn.Parameter, scale: float) -> None:
        super().__init__(weight.shape[0], weight.shape[1], _weight=weight)
        self.scale, self.weight = scale, weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``[...]`` token ids to ``[..., embedding_dim]``."""
        return super().forward(ids) * self.scale


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What unpacked weights are multiplied in: bfloat16 where the processor does so itself, else ``dtype``."""
    return torch.bfloat16 if _multiplies_bfloat16() else dtype


@lru_cache
def _multiplies_bfloat16() -> bool:
    return has_bfloat16()


def _multiply(rows: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if weights.dtype == rows.dtype:
        return functional.linear(rows, weights, None if bias is None else bias.to(rows.dtype))
    y = functional.linear(rows.to(weights.dtype), weights).to(rows.dtype)
    return y if bias is None else y.add_(bias)


def _panels(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, PANEL_BYTES // (4 * columns))
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


def from_pairs(rows: int, head_rows: int) -> torch.Tensor:
    """Which row each output is where a head's rows lie in pairs: first the first row of each pair, then the second."""
    return torch.arange(rows).view(-1, head_rows // 2, 2).transpose(1, 2).reshape(-1)


def dequantise(packed: torch.Tensor, kind: int) -> torch.Tensor:
    """Packed rows ``[n, row bytes]`` as float32 without compiled code; all but floats by the package ``gguf``."""
    if kind in _FLOATS:
        return packed.contiguous().view(_FLOATS[kind]).float()
    try:
        from gguf import GGMLQuantizationType, dequantize
    except ImportError as error:
        raise ModelError(
            f"weights of type {TYPES[kind][0]} need the package gguf here", hint="run: pip install 'kvswap[gguf]'"
        ) from error
    found = dequantize(np.ascontiguousarray(packed.numpy()), GGMLQuantizationType(kind))
    return torch.from_numpy(np.ascontiguousarray(found))
