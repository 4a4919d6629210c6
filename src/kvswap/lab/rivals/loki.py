"""Loki (arXiv 2406.02542): every head's leading principal directions of its keys rank its tokens.

The directions are learned offline from keys after RoPE. The layer's true query is used, so that selection and reads
come after it and hide behind nothing. Every KV head selects for itself; tokens are read one by one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kvswap.config import Config
from kvswap.lab.rivals.parts.decoding import TrueQueryByHead
from kvswap.lab.rivals.parts.heads import best_of_each, per_head_makers
from kvswap.lab.rivals.parts.slots import NoReuse
from kvswap.lab.rivals.window import window_by_head, without_sinks
from kvswap.selection.basis import KeyCovariance
from kvswap.selection.method import KeyFacts, Method, SketchMaker


def method() -> Method:
    """As published, with tokens on disk."""
    return Method(
        name="loki",
        paper="arXiv 2406.02542",
        makers=makers,
        score=best_of_each,
        decode=TrueQueryByHead,
        slots=NoReuse,
        window=window_by_head,
        configure=partial(without_sinks, group_tokens=1),
    )


def makers(facts: KeyFacts, config: Config) -> list[SketchMaker]:
    """Principal directions of each head. Raises UnsupportedError without a calibration."""
    return per_head_makers("loki", facts, config, "PCA", _directions)


def _directions(covariance: KeyCovariance, rank: int, device: torch.device) -> Any:
    heads, head_dim = covariance.queries.shape[:2]
    blocks = covariance.matrix.view(heads, head_dim, heads, head_dim)
    own = torch.stack([blocks[head, :, head] for head in range(heads)])
    vectors = torch.linalg.eigh(own)[1].flip(2)[:, :, :rank].float().contiguous().to(device)
    return lambda keys: vectors
