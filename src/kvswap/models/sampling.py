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
    """How the next token is chosen and when to stop. Temperature 0 takes the likeliest."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

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
        low_seed, high_seed = SEEDS
        if self.seed is not None and not (_integer(self.seed) and low_seed <= self.seed <= high_seed):
            hint = f"use a whole number from {low_seed} to {high_seed}"
            raise ConfigError(f"seed: got {self.seed}", hint=hint)

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``generate``."""
        if self.temperature == 0:
            chosen = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}  # unused, but warned about
        else:
            chosen = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {**chosen, "max_new_tokens": self.max_new_tokens}


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
