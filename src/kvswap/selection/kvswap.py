"""kvswap's own method: many directions of the keys in few bits, scored by estimated attention mass.

It follows KVSwap (arXiv 2511.11907) with the changes that docs/design.md lists.
"""

from __future__ import annotations

from functools import partial

import torch

from kvswap.config import Config
from kvswap.errors import UnsupportedError
from kvswap.selection.basis import TRANSFORM, Basis, identity_basis
from kvswap.selection.method import KeyFacts, Method, SketchMaker
from kvswap.selection.sketch import LayerSketch
from kvswap.selection.transform_sketch import TransformSketch, transform_basis


def method() -> Method:
    """What ``attach`` uses by default."""
    return Method(
        name="kvswap",
        paper="arXiv 2511.11907, changed",
        makers=makers,
        score=score,
        scores_mass=True,
    )


def makers(facts: KeyFacts, config: Config) -> list[SketchMaker]:
    """Transform codes by the calibration, or 2-bit codes of whole keys without one. Raises UnsupportedError."""
    elements, bits = facts.elements, config.sketch_bits
    if facts.statistics is None:
        whole = code_maker(facts, identity_basis(elements), 2, config.group_tokens)
        return [whole] * facts.layers
    rank = config.sketch_rank or min(elements, config.sketch_bytes(elements) * 8 // bits)
    if rank > elements or rank * bits % 8:
        raise UnsupportedError(
            f"sketch_rank {rank} of {bits} bits: more than the {elements} elements of a key, or no whole bytes",
            hint=f"use a multiple of {8 // bits} up to {elements}",
        )
    bases = facts.bases(facts.statistics, rank, bits, transform_basis)
    return [code_maker(facts, basis, bits, config.group_tokens) for basis in bases]


def code_maker(facts: KeyFacts, basis: Basis, bits: int, group_tokens: int) -> SketchMaker:
    """Codes of ``bits`` by ``basis``."""
    rank, sketch = basis.matrix.shape[1], TransformSketch if basis.kind == TRANSFORM else LayerSketch
    return SketchMaker(
        label=f"{basis.kind} rank {rank}, {bits} bit",
        token_bytes=sketch.token_bytes(rank, bits),
        scratch_token_bytes=sketch.scratch_bytes(rank, bits, facts.query_heads, facts.device, group_tokens),
        basis_bytes=basis.nbytes,
        make=partial(_make, sketch, facts, basis, bits),
    )


def score(sketch: LayerSketch, query: torch.Tensor, scaling: float, group_tokens: int) -> torch.Tensor:
    """Estimated attention mass of every group: ``[B, N]``."""
    return sketch.group_mass(query, scaling, group_tokens)


def _make(
    sketch: type[LayerSketch], facts: KeyFacts, basis: Basis, bits: int, batch: int, capacity_tokens: int
) -> LayerSketch:
    return sketch(
        batch=batch,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        basis=basis,
        bits=bits,
        capacity_tokens=capacity_tokens,
        device=facts.device,
    )
