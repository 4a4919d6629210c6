"""The two published settings of the sketch, for any method: how many bytes it has for a token in one layer.

The figures are those of KVSwap (arXiv 2511.11907), which keeps D/8 or D/32 numbers of 16 bits; everything that grows
with tokens is counted. ``relaxed:8`` is the relaxed setting with groups of eight tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvswap.config import Config
from kvswap.errors import ConfigError

PARTS = {"relaxed": (8, 4), "tight": (32, 2)}
"""By name: which part of D the bytes are, halved; and the bits of a digit, for methods with codes."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting by its name, and its size of groups where that is not the configuration's."""

    name: str
    group_tokens: int | None = None

    @classmethod
    def parse(cls, text: str) -> Setting:
        """What ``name`` or ``name:G`` says. Raises ConfigError."""
        name, colon, size = text.partition(":")
        if name not in PARTS or (colon and not size.isdigit()):
            raise ConfigError(
                f"setting: got {text!r}", hint=f"use {' or '.join(PARTS)}, with :G for groups of G tokens"
            )
        return cls(name, int(size) if colon else None)

    def __str__(self) -> str:
        return self.name if self.group_tokens is None else f"{self.name}:{self.group_tokens}"

    def apply(self, config: Config, elements: int) -> Config:
        """The configuration for keys of ``elements`` elements (D)."""
        part, bits = PARTS[self.name]
        changed = config.replace(sketch_token_bytes=elements // part * 2, sketch_bits=bits)
        return changed if self.group_tokens is None else changed.replace(group_tokens=self.group_tokens)
