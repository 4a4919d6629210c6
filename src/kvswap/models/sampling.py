"""Options of sampling. Imports nothing heavy, so that the command line can check its options at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvswap.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen and when to stop. Temperature 0 takes the likeliest."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: got {self.max_new_tokens}", hint="use 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature: got {self.temperature}", hint="use 0 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: got {self.top_p}", hint="use a number above 0 and up to 1")

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``generate``."""
        if self.temperature == 0:
            chosen = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}  # unused, but warned about
        else:
            chosen = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {**chosen, "max_new_tokens": self.max_new_tokens}
