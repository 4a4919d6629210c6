"""Sinks and a recent window, nothing else: StreamingLLM (arXiv 2309.17453), with true positions.

The window holds M tokens together with the sinks. What leaves it stays on disk, since a prompt that is appended later
attends to all of it, and is never selected.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.config import Config
from kvswap.lab.rivals.parts.slots import NoReuse
from kvswap.selection.method import KeyFacts, Method, SketchMaker, window_of
from kvswap.selection.window import Window


def method() -> Method:
    """Attends to the first and the newest tokens."""
    return Method(
        name="window",
        paper="arXiv 2309.17453",
        makers=makers,
        score=never,
        slots=NoReuse,
        calibrated=False,
        window=_window,
    )


class NoSketch:
    """Keeps nothing of the keys."""

    def __init__(self, batch: int, capacity_tokens: int) -> None:
        self.tokens: NDArray[np.int64] = np.zeros(batch, np.int64)

    @property
    def nbytes(self) -> int:
        """Nothing."""
        return 0

    def append(self, sequence: int, keys: torch.Tensor) -> None:
        """Count keys ``[H_kv, n, d]``."""
        self.tokens[sequence] += keys.shape[1]


def makers(facts: KeyFacts, config: Config) -> list[SketchMaker]:
    """No sketch in any layer."""
    nothing = SketchMaker(label="none", token_bytes=0, scratch_token_bytes=0, basis_bytes=0, make=NoSketch)
    return [nothing] * facts.layers


def without_sinks(config: Config, **changes: Any) -> Config:
    """Neither sinks nor a recent window: what most published schemes select from."""
    return config.replace(sink_tokens=0, recent_tokens=0, **changes)


def window_without_selection(config: Config, kv_heads: int) -> Window:
    """Sinks and recent window as configured, and no group beside them."""
    return replace(window_of(config, kv_heads), select_groups=0)


def window_by_head(config: Config, kv_heads: int) -> Window:
    """As configured, with a selection for each KV head."""
    return replace(window_of(config, kv_heads), selections=kv_heads)


def _window(config: Config, kv_heads: int) -> Window:
    groups = config.least_select_tokens // config.group_tokens
    return Window(config.group_tokens, config.sink_groups, max(1, groups - config.sink_groups), 0)


def never(*_: Any) -> torch.Tensor:
    """For methods that select nothing."""
    raise AssertionError("nothing is selected from, so nothing is scored")
