"""How one group is laid out on disk and in memory. Arithmetic only.

A group is one contiguous extent: K of all KV heads, then V, each ``[H_kv, G, d]``, padded to the alignment of direct
I/O. A slot in memory has the same bytes, padding included, so nothing is rearranged after a read.

One file has the groups of all rows; a row is one layer of one sequence. The file is a sequence of stripes. A stripe has
as many places for each row, row after row, so the groups of a row are neighbours within it. A file grows by whole
stripes, and nothing in it ever moves.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvswap.terms import KVGeometry, ceil_div, round_up

STRIPES = 16
"""Stripes of a file as long as planned, within the limits below. Up to one stripe is reserved and not used."""
MIN_RUN_BYTES = 128 << 10
MAX_RUN_BYTES = 4 << 20
STREAM_TILE_TOKENS = 1024
"""Tokens that many queries attend to at a time when all K, V of a layer are streamed: their logits are in memory."""
STREAM_TILE_BYTES = 2 << 20
"""What is read at a time for few queries, whose logits take no room. Disks are slower at smaller reads."""
FEW_QUERIES = 8
READ_AHEAD = 2
"""Tiles of one layer that are in flight while another is in use."""
TILE_BUFFERS = 2 * READ_AHEAD + 1
"""Most tiles in memory as they are read: of the layer that is attended to, and the first ones of the next."""


def tile_groups(slot_bytes: int, group_tokens: int, *, queries: int = FEW_QUERIES + 1) -> int:
    """Groups in one tile for ``queries`` tokens, when all K, V of a layer are streamed."""
    few, many = STREAM_TILE_BYTES // slot_bytes, STREAM_TILE_TOKENS // group_tokens
    return max(1, few if queries <= FEW_QUERIES else many)


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """The geometry of a group, and the alignment that the disk needs."""

    geometry: KVGeometry
    alignment_bytes: int

    @property
    def slot_bytes(self) -> int:
        """ByteArray of one group with its padding, on disk and in memory."""
        return round_up(self.geometry.group_bytes, self.alignment_bytes)

    @property
    def slot_elements(self) -> int:
        """Stored elements of one slot, padding included."""
        return self.slot_bytes // self.geometry.itemsize_bytes

    @property
    def group_elements(self) -> int:
        """Stored elements of one group without padding."""
        return self.geometry.group_bytes // self.geometry.itemsize_bytes

    @property
    def group_shape(self) -> tuple[int, int, int, int]:
        """Shape of one group: K or V, KV head, token, element."""
        geometry = self.geometry
        return (2, geometry.kv_heads, geometry.group_tokens, geometry.head_dim)

    def stripe_groups(self, groups: int) -> int:
        """Groups of each row in one stripe of a new file, which is planned for ``groups`` groups of each row."""
        run_bytes = min(max(groups * self.slot_bytes // STRIPES, MIN_RUN_BYTES), MAX_RUN_BYTES)
        return ceil_div(run_bytes, self.slot_bytes)

    def file_bytes(self, rows: int, groups: int, stripe_groups: int) -> int:
        """Size to allocate for a file with ``groups`` groups of each row: whole stripes, at least one."""
        return ceil_div(max(groups, 1), stripe_groups) * stripe_groups * rows * self.slot_bytes


def place_in_file(row: int, index: int, rows: int, stripe_groups: int) -> int:
    """The place in a file of a row's group number ``index`` in it, counted in groups."""
    stripe, rest = divmod(index, stripe_groups)
    return (stripe * rows + row) * stripe_groups + rest
