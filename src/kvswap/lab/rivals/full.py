"""Everything in memory, with kvswap's own chunked prefill: the reference."""

from __future__ import annotations

from kvswap.config import Config
from kvswap.core.layer_major import FullCache, InMemory, Progress, stock_layers
from kvswap.models.adapter import ModelParts


def method() -> InMemory:
    """Full attention in memory."""
    return InMemory(name="full", open=open_cache)


def open_cache(parts: ModelParts, implementation: str, config: Config, on_progress: Progress | None) -> FullCache:
    """A cache that grows without limit."""
    return FullCache(
        parts, implementation, stock_layers(parts), chunk_tokens=config.chunk_tokens, on_progress=on_progress
    )
