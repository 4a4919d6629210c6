"""Counters of one cache, and the statistics that users see.

The thread that runs the model writes the counters. Any thread may take the statistics.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Trace:
    """Counters since the cache was opened. Times in seconds, counts in groups or steps."""

    prefill_s: float = 0.0
    calibration_s: float = 0.0
    decode_steps: int = 0
    selected_groups: int = 0
    reused_groups: int = 0
    prefill_peak_bytes: int = 0
    decode_s: float = 0.0
    predict_s: float = 0.0
    slots_s: float = 0.0
    submit_s: float = 0.0
    notices: list[str] = field(default_factory=list)
    _lap_s: float = 0.0

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the wall time of the block to the field ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - start)

    def lap(self, name: str = "") -> None:
        """Add the time since the last lap to the field ``name``; without a name, only begin a new lap."""
        now = time.perf_counter()
        if name:
            setattr(self, name, getattr(self, name) + now - self._lap_s)
        self._lap_s = now


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """Statistics of one cache. ``kv_memory_limit_bytes`` is None where no limit applies.

    ``decode_s`` is the time of all decode steps without the model's head. Parts of it are ``predict_s`` (choosing
    groups), ``slots_s`` (looking them up, gathering and keeping them), ``submit_s`` (starting reads) and ``io_wait_s``
    (waiting for reads). The rest is computation. Compiled steps look groups up in the call that chooses them, so this
    counts as ``predict_s``. ``select_tokens`` is M as it was last, of the layer that attends to most.
    ``mass_kept`` is the estimated share of attention that fell on attended tokens, as a mean over ``choices``: layers,
    sequences and steps that left tokens out. It is 1 without any, and None where a method does not estimate it.
    """

    prefill_s: float = 0.0
    calibration_s: float = 0.0
    decode_steps: int = 0
    decode_s: float = 0.0
    predict_s: float = 0.0
    slots_s: float = 0.0
    submit_s: float = 0.0
    kv_full_bytes: int = 0
    kv_memory_limit_bytes: int | None = None
    kv_memory_peak_bytes: int = 0
    memory_parts: dict[str, int] = field(default_factory=dict)
    sliding_kv_bytes: int = 0
    prefill_peak_bytes: int = 0
    disk_write_bytes: int = 0
    disk_read_bytes: int = 0
    disk_reads: int = 0
    select_tokens: int = 0
    mass_kept: float | None = None
    choices: int = 0
    selected_groups: int = 0
    reuse_rate: float = 0.0
    reuse_slots: int = 0
    io_wait_s: float = 0.0
    backend: str = "none"
    direct_io: bool = False
    sketch: str = "none"

    def since(self, before: CacheStats) -> dict[str, Any]:
        """Sizes as they are now, times and counts since ``before``, by name."""
        selected = self.selected_groups - before.selected_groups
        reused = self.reuse_rate * self.selected_groups - before.reuse_rate * before.selected_groups
        choices, mass_kept = self.choices - before.choices, self.mass_kept
        if mass_kept is not None and choices:
            mass_kept = (mass_kept * self.choices - (before.mass_kept or 0.0) * before.choices) / choices
        grown = ("prefill_s", "disk_write_bytes", "disk_read_bytes", "disk_reads", "io_wait_s")
        kept = ["kv_full_bytes", "kv_memory_limit_bytes", "kv_memory_peak_bytes", "memory_parts", "sliding_kv_bytes"]
        kept += ["prefill_peak_bytes", "select_tokens", "backend", "direct_io"]
        return {
            **{name: getattr(self, name) - getattr(before, name) for name in grown},
            **{name: getattr(self, name) for name in kept},
            "mass_kept": mass_kept,
            "reuse_rate": reused / selected if selected else 0.0,
        }
