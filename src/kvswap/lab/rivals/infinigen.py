"""InfiniGen (arXiv 2406.19707): a few columns of every head's keys, by index, tell which tokens the next layer needs.

Queries and keys of a head are turned by the singular vectors of its queries, learned offline, so that few columns carry
most of the product. The columns with the largest sums of |Q| and |K| are kept (|K| over the prompt's first keys, |Q| as
calibrated). The query of layer l is guessed from layer l - 1's normalised input. Tokens are read one by one. As kvswap
has the same bytes for its sketch, D/8 columns of 16 bits are kept where the paper takes 30 % of D.

``infinigen`` lets every KV head select for itself. ``infinigen*`` adds logits over heads, so that all heads share a
selection, and ``infinigen*+reuse`` keeps what the step before selected: the variants that KVSwap (arXiv 2511.11907)
compares with.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kvswap.config import Config
from kvswap.lab.rivals.parts.decoding import PreviousNorm, PreviousNormByHead
from kvswap.lab.rivals.parts.heads import best_of_each, best_of_sum, per_head_makers
from kvswap.lab.rivals.parts.slots import NoReuse, PreviousSlots
from kvswap.lab.rivals.window import window_by_head, without_sinks
from kvswap.selection.basis import KeyCovariance
from kvswap.selection.method import KeyFacts, Method, SketchMaker

PAPER = "arXiv 2406.19707"


def per_head() -> Method:
    """As published."""
    return _method("infinigen", score=best_of_each, decode=PreviousNormByHead, slots=NoReuse, window=window_by_head)


def joined() -> Method:
    """One selection for all heads."""
    return _method("infinigen*", score=best_of_sum, decode=PreviousNorm, slots=NoReuse)


def joined_with_reuse() -> Method:
    """One selection for all heads, and what the step before selected stays in memory."""
    return _method("infinigen*+reuse", score=best_of_sum, decode=PreviousNorm, slots=PreviousSlots)


def makers(facts: KeyFacts, config: Config) -> list[SketchMaker]:
    """The strongest columns of each head's turned keys. Raises UnsupportedError without a calibration."""
    return per_head_makers("infinigen", facts, config, "columns", _directions)


def strongest(turn: torch.Tensor, strength: torch.Tensor, rank: int, keys: torch.Tensor) -> torch.Tensor:
    """Columns of ``turn`` ``[H_kv, d, d]`` with the largest |Q| (``strength`` ``[H_kv, d]``, a token's) and |K|.

    ``keys`` are ``[H_kv, n, d]``; the result is ``[H_kv, d, rank]``.
    """
    sums = (keys @ turn).abs().sum(1) + strength * keys.shape[1]
    picked = sums.topk(rank, dim=1).indices.sort(dim=1).values
    return turn.gather(2, picked[:, None].expand(-1, turn.shape[1], -1))


def _method(name: str, **choices: Any) -> Method:
    return Method(
        name=name,
        paper=PAPER,
        makers=makers,
        configure=partial(without_sinks, group_tokens=1),
        **choices,
    )


def _directions(covariance: KeyCovariance, rank: int, device: torch.device) -> Any:
    values, vectors = torch.linalg.eigh(covariance.queries / max(1, covariance.query_count))
    strength = values.clamp(min=0).sqrt()
    return partial(strongest, vectors.float().to(device), strength.float().to(device), rank)
