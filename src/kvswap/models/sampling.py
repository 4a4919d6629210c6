"""Options of sampling. Imports nothing heavy, so that the command line can check its options at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvswap.errors import ConfigError

SEEDS = (-(1 << 63), (1 << 64) - 1)
"""What torch takes as a seed."""
TEMPERATURES = (1e-6, 1e6)
"""Beyond these, logits divided by the temperature overflow float32 or all become equal."""
MOST_TOKENS = (1 << 31) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen and when to stop. Temperature 0 takes the likeliest.

    ``top_k`` keeps so many of the likeliest tokens (0: all), ``min_p`` those of at least this share of the likeliest
    one's probability (0: all). An answer ends before the first of the strings ``stop``.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _integer(self.max_new_tokens) or self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: got {self.max_new_tokens}", hint="use 1 or more")
        if self.max_new_tokens > MOST_TOKENS:
            raise ConfigError(f"max_new_tokens: got {self.max_new_tokens}", hint=f"use {MOST_TOKENS:,} or less")
        low, high = TEMPERATURES
        if not _number(self.temperature) or not (self.temperature == 0 or low <= self.temperature <= high):
            hint = f"use 0 for the likeliest token, or {low:f} to {high:,.0f}"
            raise ConfigError(f"temperature: got {self.temperature}", hint=hint)
        if not _number(self.top_p) or not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: got {self.top_p}", hint="use a number above 0 and up to 1")
        if not _integer(self.top_k) or not 0 <= self.top_k <= MOST_TOKENS:
            raise ConfigError(f"top_k: got {self.top_k}", hint="use 0 for all tokens, or 1 or more")
        if not _number(self.min_p) or not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p: got {self.min_p}", hint="use a number from 0 to 1")
        self._check_seed()
        self._check_stop()

    def _check_seed(self) -> None:
        low_seed, high_seed = SEEDS
        if self.seed is not None and not (_integer(self.seed) and low_seed <= self.seed <= high_seed):
            hint = f"use a whole number from {low_seed} to {high_seed}"
            raise ConfigError(f"seed: got {self.seed}", hint=hint)

    def _check_stop(self) -> None:
        if not isinstance(self.stop, tuple) or not all(isinstance(each, str) and each for each in self.stop):
            raise ConfigError(f"stop: got {self.stop!r}", hint="give strings that are not empty")

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``generate``."""
        if self.temperature == 0:
            chosen = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}  # unused, but warned about
        else:
            chosen = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
            if self.min_p:
                chosen["min_p"] = self.min_p
        return {**chosen, "max_new_tokens": self.max_new_tokens}


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
