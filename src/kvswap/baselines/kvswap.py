"""kvswap itself: many directions of the keys in few bits, scored by estimated attention mass one layer ahead.

After KVSwap (arXiv 2511.11907), with the changes that docs/design.md lists; ``kvswap_paper`` is the published scheme.
"""

from __future__ import annotations

from functools import partial

import torch

from kvswap.config import Config
from kvswap.errors import UnsupportedError
from kvswap.method import KeyFacts, Method, SketchMaker
from kvswap.predict.mass import group_mass
from kvswap.sketch.basis import Basis, identity_basis, rank_for
from kvswap.sketch.codes import LayerSketch


def method() -> Method:
    """What ``attach`` uses by default."""
    return Method(
        name="kvswap",
        paper="arXiv 2511.11907, changed",
        makers=makers,
        score=score,
        query="own_norm",
        reuse="worth",
    )


def makers(facts: KeyFacts, config: Config) -> list[SketchMaker]:
    """Codes in the calibrated directions, or 2-bit codes of whole keys. Raises UnsupportedError."""
    elements = facts.elements
    if facts.statistics is None:
        whole = code_maker(facts, identity_basis(elements), 2)
        return [whole] * facts.layers
    rank = config.sketch_rank or rank_for(elements, config.sketch_bits, elements // 8 * 2)
    if rank > elements:
        raise UnsupportedError(f"sketch_rank {rank} is more than the {elements} elements of a key", hint="lower it")
    return [code_maker(facts, covariance.basis(rank), config.sketch_bits) for covariance in facts.statistics]


def code_maker(facts: KeyFacts, basis: Basis, bits: int) -> SketchMaker:
    """Codes of ``bits`` in the directions of ``basis``."""
    rank = basis.matrix.shape[1]
    return SketchMaker(
        label=f"{basis.kind} rank {rank}, {bits} bit",
        token_bytes=LayerSketch.token_bytes(rank, bits),
        scratch_token_bytes=LayerSketch.scratch_bytes(rank, bits, facts.query_heads, facts.device),
        basis_bytes=basis.matrix.nbytes,
        make=partial(_make, facts, basis, bits),
    )


def score(sketch: LayerSketch, query: torch.Tensor, scaling: float, group_tokens: int) -> torch.Tensor:
    """Estimated attention mass of every group: ``[B, N]``."""
    return group_mass(sketch.logits(query, scaling), group_tokens)


def _make(facts: KeyFacts, basis: Basis, bits: int, batch: int, capacity_tokens: int) -> LayerSketch:
    return LayerSketch(
        batch=batch,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        basis=basis,
        bits=bits,
        capacity_tokens=capacity_tokens,
        device=facts.device,
    )
