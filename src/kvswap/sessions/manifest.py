"""What a session's manifest says (docs/file-format.md), as values, and how it is written; ``store/parse.py`` reads it.

Pure: values in, text out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass

from kvswap.core.rates import Rates
from kvswap.store.checksum import text_sum
from kvswap.terms import KVGeometry, ceil_div, round_up

MAGIC, VERSION = "kvswap-session", 2
LIMIT_BYTES = 16 << 20
CHECKPOINTS = 8
SEGMENTS = 32
ITEMSIZES_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}

Counts = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Whose K, V these are; ``name`` is for display, the rest must be equal."""

    name: str
    fingerprint: str
    tokenizer: str
    rope: str
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Geometry of groups and sketch; the same for the whole life of a session."""

    layers: int
    kv_heads: int
    head_dim: int
    group_tokens: int
    dtypes: tuple[str, ...]
    alignment_bytes: int
    sketch_rank: int
    sketch_bits: int
    sketch_kind: str
    sink_tokens: int
    recent_tokens: int

    @property
    def geometry(self) -> KVGeometry:
        """Shape of one layer's groups."""
        return KVGeometry(
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            group_tokens=self.group_tokens,
            itemsize_bytes=ITEMSIZES_BYTES[self.dtypes[0]],
        )

    @property
    def slot_bytes(self) -> int:
        """Bytes of a group with its padding."""
        return round_up(self.geometry.group_bytes, self.alignment_bytes)

    @property
    def code_rows(self) -> int:
        """Bytes of one token's codes."""
        return self.sketch_rank * self.sketch_bits // 8

    @property
    def scale_rows(self) -> int:
        """Scales of a token: scale and minimum, or none."""
        return 0 if self.sketch_kind == "transform" else 2

    @property
    def basis_rows(self) -> int:
        """Rows of one layer's basis: one an element, twice that and five for a transform."""
        elements = self.kv_heads * self.head_dim
        return 2 * elements + 5 if self.sketch_kind == "transform" else elements

    @property
    def waiting_groups(self) -> int:
        """Most groups of a layer that may not be on disk yet, the rolling tail included."""
        return ceil_div(self.recent_tokens, self.group_tokens) + ceil_div(self.sink_tokens, self.group_tokens) + 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Encryption:
    """How a session is encrypted; ``salt`` and ``check`` are hexadecimal digits."""

    cipher: str
    salt: str
    check: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """A small file that is read whole: its name, length and checksum, as it is stored."""

    file: str
    bytes: int
    xxh3: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Groups ``start`` to ``high`` by layer, in files of their own; see the format."""

    number: int
    owned: bool
    start: Counts
    high: Counts
    index_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A state that can be gone back to: ``segments`` are pairs of a number and the index length that counts.

    The next commit takes the place of an ``interim`` one.
    """

    commit: int
    interim: bool
    tokens: int
    flushed: Counts
    tail: Blob
    segments: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that is committed. A new session has neither model nor checkpoints."""

    created: int
    used: int
    commits: int = 0
    written_bytes: int = 0
    encryption: Encryption | None = None
    rates: Rates | None = None
    model: Model | None = None
    layout: Layout | None = None
    basis: Blob | None = None
    segments: tuple[Segment, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()

    @property
    def current(self) -> Checkpoint | None:
        """What the session holds now."""
        return self.checkpoints[-1] if self.checkpoints else None

    def segment(self, number: int) -> Segment:
        """The segment of that number."""
        return next(segment for segment in self.segments if segment.number == number)

    def ends(self, checkpoint: Checkpoint) -> list[tuple[Segment, Counts]]:
        """Segments of a checkpoint in order, each with the groups by layer at which it ends there.

        A later segment takes over at its start; after a cut its start may lie below that of one before it.
        """
        limits, found = list(checkpoint.flushed), []
        for number, _ in reversed(checkpoint.segments):
            segment = self.segment(number)
            found.append((segment, tuple(map(max, segment.start, limits))))
            limits = list(map(min, segment.start, limits))
        return found[::-1]

    def files(self) -> dict[str, int]:
        """Names that count, with the least length of each."""
        sizes = {blob.file: blob.bytes for blob in self.blobs()}
        if self.layout is None:
            return sizes
        for segment in self.segments:
            sizes[f"index-{segment.number}"] = segment.index_bytes
            for layer in range(self.layout.layers):
                groups = segment.high[layer] - segment.start[layer]
                sizes[f"data-{segment.number}-{layer}"] = groups * self.layout.slot_bytes
        return sizes

    def blobs(self) -> list[Blob]:
        """Basis and tails."""
        basis = [self.basis] if self.basis else []
        return [*basis, *(checkpoint.tail for checkpoint in self.checkpoints)]


def encode(manifest: Manifest, sign: Callable[[bytes], str]) -> bytes:
    """The manifest as it is written; ``sign`` gives what authenticates it, or nothing."""
    values = {"byte_order": "little", **dataclasses.asdict(manifest)}
    body = json.dumps(values, indent=1).encode()
    words = (MAGIC, str(VERSION), text_sum(body), sign(body))
    return f"{' '.join(word for word in words if word)}\n".encode() + body
