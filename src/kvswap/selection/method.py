"""What one method of keeping a KV cache on disk decides; kvswap and its rivals differ in nothing else.

A ``Method`` says what is kept of a layer's keys, from which query and how groups are scored, at what granularity tokens
are read, what is always attended to and what is reused. Store, slots, reads and attention are the same for all. Each
method is a small file in ``kvswap.lab.rivals``; ``kvswap.lab.rivals.registry`` knows their names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.config import Config
from kvswap.selection.basis import KeyCovariance
from kvswap.selection.window import Window

Query = Literal["own_norm", "previous_norm", "true", "none"]
Reuse = Literal["worth", "previous", "none"]
Turn = Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]


class Sketch(Protocol):
    """What a method keeps in memory of one layer's keys, for B sequences."""

    tokens: NDArray[np.int64]
    """``[B]``: tokens kept of each sequence."""

    @property
    def nbytes(self) -> int:
        """Bytes that grow with tokens."""

    def append(self, sequence: int, keys: torch.Tensor) -> None:
        """Add keys ``[H_kv, n, d]`` (after RoPE, any float dtype) of whole groups to one sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchMaker:
    """Makes the sketch of one layer, and says beforehand what it costs.

    ``token_bytes``: of one token of one sequence. ``scratch_token_bytes``: what scoring one token takes in passing.
    ``basis_bytes``: what does not grow; ``sequence_bytes``: of that, what every sequence has for itself.
    ``make(batch, capacity_tokens)`` gives an empty sketch.
    """

    label: str
    token_bytes: int
    scratch_token_bytes: int
    basis_bytes: int
    make: Callable[[int, int], Sketch]
    sequence_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFacts:
    """What a method can know when it makes its sketches.

    ``statistics``: one covariance an offloaded layer, or None where nothing could be calibrated. ``turn(keys,
    positions, inverse)`` applies the model's RoPE to keys ``[H_kv, n, d]``, or takes it off.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    device: torch.device
    statistics: list[KeyCovariance] | None
    turn: Turn

    @property
    def elements(self) -> int:
        """D."""
        return self.kv_heads * self.head_dim


def window_of(config: Config) -> Window:
    """Sinks, recent window and selection as the configuration has them."""
    return Window(config.group_tokens, config.sink_groups, config.recent_groups, config.select_groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """The choices of one method.

    Parameters
    ----------
    name, paper
        As users see it, and where it is published.
    makers
        ``makers(facts, config)``: one ``SketchMaker`` an offloaded layer.
    score
        ``score(sketch, query, scaling, group_tokens)``: query ``[B, H_q, d]`` to a score of every group ``[B, N]``
        float32; with ``per_head`` one for every KV head, ``[B, H_kv, N]``.
    query
        Where the query comes from. One layer ahead: the hidden state under the layer's own input norm, or under the
        norm of the layer before. In the layer itself, so that no read is hidden: its true query. Or none is needed.
    reuse
        ``worth``: slots pooled over layers, recency and score decide. ``previous``: what the step before selected.
    per_head
        Whether every KV head selects for itself and attends to nothing else.
    streams
        Whether all of a layer is read at each step, in large pieces, instead of selected groups.
    rebuilds_keys
        Whether V alone is read and the sketch gives K: ``sketch.keys(groups)``, ``[B, n]`` to ``[B, H_kv, n * G, d]``.
    calibrated
        Whether ``facts.statistics`` are wanted.
    configure
        The configuration that this method works with, from the one that the user gave.
    window
        Which groups are pinned and how many are selected.
    """

    name: str
    paper: str
    makers: Callable[[KeyFacts, Config], list[SketchMaker]]
    score: Callable[..., torch.Tensor]
    query: Query
    reuse: Reuse
    per_head: bool = False
    streams: bool = False
    rebuilds_keys: bool = False
    calibrated: bool = True
    configure: Callable[[Config], Config] = lambda config: config
    window: Callable[[Config], Window] = window_of
