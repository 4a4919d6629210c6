"""Packed codes of B sequences, in tiles of 64 tokens.

A tile is ``[rows, 64]`` uint8, dimension-major, so that scoring reads along tokens. It is contiguous, so that scoring
only some of the tiles touches no other memory. ``score.py`` says which bits of which row hold a dimension.
"""

from __future__ import annotations

import torch

from kvswap.native.loops import SCORE_TILE_TOKENS
from kvswap.terms import ceil_div, round_up


class PackedCodes:
    """``tiles``: ``[B, capacity / 64, rows, 64]`` uint8, with room for whole steps of ``step_tokens``."""

    def __init__(
        self, batch: int, rows: int, capacity_tokens: int, device: torch.device, *, step_tokens: int = 256
    ) -> None:
        self._step_tokens = step_tokens
        tiles = round_up(capacity_tokens, step_tokens) // SCORE_TILE_TOKENS
        self.tiles = torch.zeros(batch, tiles, rows, SCORE_TILE_TOKENS, dtype=torch.uint8, device=device)

    def grow(self, tokens: int) -> None:
        """Make room for sequences of ``tokens``."""
        extra = round_up(tokens, self._step_tokens) // SCORE_TILE_TOKENS - self.tiles.shape[1]
        if extra > 0:
            self.tiles = torch.nn.functional.pad(self.tiles, (0, 0, 0, 0, 0, extra))

    def put(self, sequence: int, start: int, packed: torch.Tensor) -> None:
        """Write the bytes ``[rows, n]`` of tokens from ``start`` on; ``grow`` has made room."""
        tiles, done, count = self.tiles[sequence], 0, packed.shape[1]
        while done < count:  # the rest of a partial tile, then whole tiles at once, then the beginning of another
            tile, offset = divmod(start + done, SCORE_TILE_TOKENS)
            whole = (count - done) // SCORE_TILE_TOKENS
            if offset == 0 and whole:
                part = packed[:, done : done + whole * SCORE_TILE_TOKENS]
                tiles[tile : tile + whole] = part.unflatten(1, (whole, SCORE_TILE_TOKENS)).transpose(0, 1)
                done += whole * SCORE_TILE_TOKENS
            else:
                some = min(SCORE_TILE_TOKENS - offset, count - done)
                tiles[tile, :, offset : offset + some] = packed[:, done : done + some]
                done += some

    def rows(self, sequence: int, start: int, stop: int) -> torch.Tensor:
        """The bytes of tokens ``[start, stop)``: ``[rows, stop - start]``, a copy."""
        first = start // SCORE_TILE_TOKENS
        tiles = self.tiles[sequence, first : ceil_div(stop, SCORE_TILE_TOKENS)]
        return tiles.transpose(0, 1).flatten(1)[:, start - first * SCORE_TILE_TOKENS : stop - first * SCORE_TILE_TOKENS]
