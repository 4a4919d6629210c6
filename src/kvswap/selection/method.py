"""What one method of keeping a KV cache on disk decides.

A ``Method`` says what is kept of a layer's keys, how groups are scored, at what granularity tokens are read and what is
always attended to. kvswap's own is in ``selection/kvswap.py``. Published methods that it is compared with may also
replace the decode path or the slots; kvswap's own path never enters those hooks. Store and disk are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.config import AUTO_MOST_TOKENS, AUTO_SHARE, Config
from kvswap.selection.basis import Basis, KeyCovariance
from kvswap.selection.window import Window

Rotate = Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]
MakeBasis = Callable[[KeyCovariance, int, int], Basis]


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
    """Makes the sketch of one layer, and says beforehand what memory it takes.

    ``token_bytes`` is the sketch of one token of one sequence. ``scratch_token_bytes`` is temporary memory for scoring
    one token. ``basis_bytes`` does not grow with tokens, and ``sequence_bytes`` neither: that is for each sequence.
    ``make(batch, capacity_tokens)`` gives an empty sketch.
    """

    label: str
    token_bytes: int
    scratch_token_bytes: int
    basis_bytes: int
    make: Callable[[int, int], Sketch]
    sequence_bytes: int = 0


def made_bases(statistics: Sequence[KeyCovariance], rank: int, bits: int, make: MakeBasis) -> list[Basis]:
    """``make(statistics, rank, bits)`` of each layer."""
    return [make(each, rank, bits) for each in statistics]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFacts:
    """What a method can know of a model's keys when it makes its sketches.

    ``statistics`` has one covariance for each offloaded layer, or is None without a calibration.
    ``rotate(keys, positions, inverse)`` applies the model's RoPE to keys ``[H_kv, n, d]``, or its inverse.
    ``bases`` gives what ``made_bases`` gives; ``core`` keeps it.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    device: torch.device
    statistics: list[KeyCovariance] | None
    rotate: Rotate
    bases: Callable[[Sequence[KeyCovariance], int, int, MakeBasis], list[Basis]] = made_bases

    @property
    def elements(self) -> int:
        """D."""
        return self.kv_heads * self.head_dim


def window_of(config: Config, kv_heads: int) -> Window:
    """Sinks, recent window and selection as the configuration has them; all KV heads share one selection."""
    window = Window(config.group_tokens, config.sink_groups, config.recent_groups, config.select_groups)
    if not config.grows:
        return window
    most = (AUTO_MOST_TOKENS - config.pinned_tokens) // config.group_tokens
    return replace(window, share=AUTO_SHARE, most_select_groups=max(most, window.select_groups))


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """The choices of one method.

    Parameters
    ----------
    name, paper
        As users see it, and where it is published.
    makers
        ``makers(facts, config)``: one ``SketchMaker`` for each offloaded layer.
    score
        ``score(sketch, query, scaling, group_tokens)``: query ``[B, H_q, d]`` to a score of every group, ``[B, N]``
        float32.
    scores_mass
        Whether the scores of groups are their estimated shares of attention.
    calibrated
        Whether ``facts.statistics`` are needed.
    configure
        The configuration that this method works with, from the one that the user gave.
    window
        ``window(config, kv_heads)``: which groups are pinned and how many are selected.
    decode
        Takes the place of ``core.decode.Decode`` where a method decodes in another way, with the same arguments.
    slots
        Takes the place of ``memory.slots.SlotPool`` where a method reuses groups in another way.
    extra_scratch_bytes
        ``extra_scratch_bytes(group_tokens, slot_bytes)``: memory that ``decode`` needs beside what kvswap's own does.
    """

    name: str
    paper: str
    makers: Callable[[KeyFacts, Config], list[SketchMaker]]
    score: Callable[..., torch.Tensor]
    scores_mass: bool = False
    calibrated: bool = True
    configure: Callable[[Config], Config] = lambda config: config
    window: Callable[[Config, int], Window] = window_of
    decode: Any = None
    slots: Any = None
    extra_scratch_bytes: Callable[[int, int], int] = lambda group_tokens, slot_bytes: 0
