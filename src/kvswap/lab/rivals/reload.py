"""FlexGen's way with a cache on disk (arXiv 2303.06865): each layer's whole K, V pass through memory at every step.

Pieces of 1,024 tokens are read in order, the next two while one is attended to, and merged exactly. Nothing is
selected and nothing but three pieces is held. FlexGen also begins the next layer's reads before this one ends; with the
disk busy all the time that changes nothing.
"""

from __future__ import annotations

from kvswap.lab.rivals.parts.decoding import Streaming
from kvswap.lab.rivals.parts.slots import NoReuse
from kvswap.lab.rivals.window import makers, never, window_without_selection
from kvswap.selection.method import Method
from kvswap.store.layout import READ_AHEAD, tile_groups


def method() -> Method:
    """Exact, and limited by the disk alone."""
    return Method(
        name="reload",
        paper="arXiv 2303.06865",
        makers=makers,
        score=never,
        decode=Streaming,
        slots=NoReuse,
        extra_scratch_bytes=_tiles_bytes,
        calibrated=False,
        window=window_without_selection,
    )


def _tiles_bytes(group_tokens: int, slot_bytes: int) -> int:
    return (READ_AHEAD + 1) * tile_groups(slot_bytes, group_tokens) * slot_bytes
