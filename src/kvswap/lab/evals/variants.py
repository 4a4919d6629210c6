"""What an evaluation compares: a method under a memory limit, with a published sketch setting or as configured."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvswap.config import Config
from kvswap.errors import ConfigError

PUBLISHED = {"relaxed": (8, 4), "tight": (32, 2)}
"""By name: n of the sketch's D/n x 2 bytes per token and layer, and bits per number for methods with codes."""


@dataclass(frozen=True, slots=True)
class SketchSetting:
    """One of the two published sketch sizes, for any method, and optionally a group size.

    The sizes are those of KVSwap (arXiv 2511.11907), which keeps D/8 or D/32 numbers of 16 bits per token and layer.
    Everything that grows with tokens counts. ``group_tokens`` None keeps the configuration's group size.
    """

    name: str
    group_tokens: int | None = None

    @classmethod
    def parse(cls, text: str) -> SketchSetting:
        """Parse ``relaxed``, ``tight``, or either with ``:G``, such as ``tight:8``. Raises ConfigError."""
        name, colon, size = text.partition(":")
        if name not in PUBLISHED or (colon and not re.fullmatch(r"[0-9]{1,9}", size)):
            raise ConfigError(
                f"setting: got {text[:40]!r}", hint=f"use {' or '.join(PUBLISHED)}, with :G for groups of G tokens"
            )
        if colon:
            Config(group_tokens=int(size))  # raises where no configuration may have it
        return cls(name, int(size) if colon else None)

    def __str__(self) -> str:
        return self.name if self.group_tokens is None else f"{self.name}:{self.group_tokens}"

    def apply(self, config: Config, elements: int) -> Config:
        """Return ``config`` with this setting, for keys of ``elements`` elements (D)."""
        part, bits = PUBLISHED[self.name]
        changed = config.replace(sketch_token_bytes=elements // part * 2, sketch_bits=bits)
        return changed if self.group_tokens is None else changed.replace(group_tokens=self.group_tokens)


@dataclass(frozen=True, slots=True)
class Variant:
    """A method under a memory limit, with a sketch setting. ``full`` has neither."""

    method: str
    kv_memory: str | None = None
    setting: SketchSetting | None = None

    @property
    def key(self) -> tuple[str, str | None, str | None]:
        """Method, memory limit and setting as they stand in records; unique among variants."""
        return self.method, self.kv_memory, None if self.setting is None else str(self.setting)

    def configure(self, config: Config, elements: int, context_tokens: int) -> Config:
        """Return the configuration of this variant, for keys of ``elements`` elements (D) and a context.

        Where M grows with the context, every method gets the same M, that of a fast disk.
        """
        config = config.replace(select_tokens=config.selected_tokens(context_tokens))
        if self.kv_memory is not None:
            config = config.replace(kv_memory=self.kv_memory)
        return config if self.setting is None else self.setting.apply(config, elements)


FULL = Variant("full")
