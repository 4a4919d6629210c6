"""KVSwap as published (arXiv 2511.11907, section 3 and its artifact).

Keys of all heads are projected to rank R in 16 bits. The query of layer l comes from the input of layer l - 1 under
layer l - 1's norm; raw logits are averaged over heads, the best token stands for its group. Attended to are the
selected groups and the newest one while it fills (and for one step more, until it is on disk). A slot keeps what the
step before selected. R is what fits the bytes that kvswap's own sketch has.
"""

from __future__ import annotations

from functools import partial

import torch

from kvswap.config import Config
from kvswap.errors import UnsupportedError
from kvswap.lab.rivals.parts.decoding import PreviousNorm
from kvswap.lab.rivals.parts.rows import ITEM_BYTES, RowSketch
from kvswap.lab.rivals.parts.slots import PreviousSlots
from kvswap.lab.rivals.window import without_sinks
from kvswap.selection.basis import Basis
from kvswap.selection.choose import best_of_groups
from kvswap.selection.method import KeyFacts, Method, SketchMaker


def method() -> Method:
    """The published scheme."""
    return Method(
        name="kvswap-paper",
        paper="arXiv 2511.11907",
        makers=makers,
        score=score,
        decode=PreviousNorm,
        slots=PreviousSlots,
        configure=without_sinks,
    )


def makers(facts: KeyFacts, config: Config) -> list[SketchMaker]:
    """Rows of the leading singular directions in 16 bits. Raises UnsupportedError without a calibration."""
    if facts.statistics is None:
        raise UnsupportedError("kvswap-paper without a tokenizer to calibrate with", hint="pass the tokenizer")
    rank = config.sketch_rank or max(1, config.sketch_bytes(facts.elements) // ITEM_BYTES)
    if rank > facts.elements:
        raise UnsupportedError(
            f"sketch_rank {rank} is more than the {facts.elements} elements of a key", hint="lower it"
        )
    return [_maker(facts, Basis(covariance.leading(rank), "svd")) for covariance in facts.statistics]


def score(sketch: RowSketch, query: torch.Tensor, scaling: float, group_tokens: int) -> torch.Tensor:
    """Logits added over heads, then the best token of each group: ``[B, N]``. The mean ranks the same."""
    return best_of_groups(sketch.summed_logits(query), group_tokens)


def _maker(facts: KeyFacts, basis: Basis) -> SketchMaker:
    rank = basis.matrix.shape[1]
    return SketchMaker(
        label=f"svd rank {rank}, 16 bit",
        token_bytes=rank * ITEM_BYTES,
        scratch_token_bytes=RowSketch.scratch_bytes(rank),
        basis_bytes=basis.matrix.nbytes,
        make=partial(_make, facts, basis),
    )


def _make(facts: KeyFacts, basis: Basis, batch: int, capacity_tokens: int) -> RowSketch:
    return RowSketch(
        batch=batch, kv_heads=facts.kv_heads, basis=basis, capacity_tokens=capacity_tokens, device=facts.device
    )
