"""What is committed in a session (docs/file-format.md), as values. ``manifest_json`` writes and reads them as text.

Field names are those of the format. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kvswap.core.load_or_recompute import Rates
from kvswap.store.layout import place_in_file
from kvswap.terms import KVGeometry, ceil_div, round_up

MAX_CHECKPOINTS = 8
MAX_SEGMENTS = 32
_ENDLESS = 1 << 40
"""Groups of a stripe that no file fills."""
ITEMSIZES_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}

Counts = tuple[int, ...]
"""One number a layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The model whose K, V are stored. ``name`` is for display; a model fits if all other fields are equal."""

    name: str
    fingerprint: str
    tokenizer: str
    rope: str
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Geometry of groups and sketch. It never changes within a session."""

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
        """Bytes of a group on disk, with its padding."""
        return round_up(self.geometry.group_bytes, self.alignment_bytes)

    @property
    def code_rows(self) -> int:
        """Bytes of the codes of one token."""
        return self.sketch_rank * self.sketch_bits // 8

    @property
    def scale_rows(self) -> int:
        """Scales of one token: scale and minimum, or none."""
        return 0 if self.sketch_kind == "transform" else 2

    @property
    def basis_rows(self) -> int:
        """Rows of one layer's basis: one for each element of a key; for a transform two each, and five more."""
        elements = self.kv_heads * self.head_dim
        return 2 * elements + 5 if self.sketch_kind == "transform" else elements

    @property
    def waiting_groups(self) -> int:
        """Most groups of a layer that may not be on disk yet, rolling tail included."""
        return ceil_div(self.recent_tokens, self.group_tokens) + ceil_div(self.sink_tokens, self.group_tokens) + 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Encryption:
    """How a session is encrypted. ``salt`` and ``check`` are hexadecimal digits."""

    cipher: str
    salt: str
    check: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """A small file that is read whole: its name, and length and checksum of its bytes on disk."""

    file: str
    bytes: int
    xxh3: str


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` groups of a layer from ``first`` on, which follow each other in a file."""

    file: str
    offset_bytes: int
    first: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Groups ``start[layer]`` up to ``high[layer]`` of every layer, in one file with stripes of ``stripe_groups``.

    Segments of format versions 1 and 2 have one file a layer instead, and None. A session appends to its ``owned``
    segments alone. The others are shared with a second session.
    """

    number: int
    owned: bool
    start: Counts
    high: Counts
    index_bytes: int
    stripe_groups: int | None

    def names(self) -> list[str]:
        """Names of its data files: one, or one a layer."""
        if self.stripe_groups is not None:
            return [f"data-{self.number}"]
        return [f"data-{self.number}-{layer}" for layer in range(len(self.start))]

    def files(self, layout: Layout) -> dict[str, int]:
        """Names of its data files, each with the fewest bytes it must have."""
        sizes = dict.fromkeys(self.names(), 0)
        for layer, (start, high) in enumerate(zip(self.start, self.high, strict=True)):
            if start < high:
                name, place, _ = self._place(layer, high - 1)
                sizes[name] = max(sizes[name], (place + 1) * layout.slot_bytes)
        return sizes

    def runs(self, layout: Layout, layer: int, first: int, end: int, most_bytes: int) -> Iterator[Run]:
        """Groups ``[first, end)`` of a layer in runs that are in one piece on disk, of up to ``most_bytes``."""
        most = max(1, most_bytes // layout.slot_bytes)
        while first < end:
            name, place, room = self._place(layer, first)
            count = min(end - first, room, most)
            yield Run(name, place * layout.slot_bytes, first, count)
            first += count

    def _place(self, layer: int, group: int) -> tuple[str, int, int]:
        """Of a group: its file, its place there in groups, and how many of its layer go on there."""
        index = group - self.start[layer]
        if self.stripe_groups is None:
            return f"data-{self.number}-{layer}", index, _ENDLESS
        place = place_in_file(layer, index, len(self.start), self.stripe_groups)
        return f"data-{self.number}", place, self.stripe_groups - index % self.stripe_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A committed state.

    ``flushed`` counts whole groups on disk, by layer. ``segments`` are pairs: the number of a segment, and how many
    bytes of its index belong to the checkpoint. The next commit replaces an ``interim`` checkpoint.
    """

    commit: int
    interim: bool
    tokens: int
    flushed: Counts
    tail: Blob
    segments: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that is committed. A new session has no model, layout, basis or checkpoints."""

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
        """The newest checkpoint: what the session contains now."""
        return self.checkpoints[-1] if self.checkpoints else None

    def segment(self, number: int) -> Segment:
        """The segment with a number."""
        return next(segment for segment in self.segments if segment.number == number)

    def ends(self, checkpoint: Checkpoint) -> list[tuple[Segment, Counts]]:
        """Segments of a checkpoint in order, each with the group of every layer at which the checkpoint's part ends.

        A later segment replaces earlier ones from its start on. After ``truncate`` it may start below an earlier one.
        """
        limits, found = list(checkpoint.flushed), []
        for number, _ in reversed(checkpoint.segments):
            segment = self.segment(number)
            found.append((segment, tuple(map(max, segment.start, limits))))
            limits = list(map(min, segment.start, limits))
        return found[::-1]

    def referenced(self, segment: Segment) -> tuple[Counts, int] | None:
        """Groups by layer, and bytes of the index, up to which checkpoints refer to a segment; None where none does."""
        ends, index_bytes = [], 0
        for checkpoint in self.checkpoints:
            for (each, end), (_, length_bytes) in zip(self.ends(checkpoint), checkpoint.segments, strict=True):
                if each.number == segment.number:
                    ends.append(end)
                    index_bytes = max(index_bytes, length_bytes)
        return (tuple(max(column) for column in zip(*ends, strict=True)), index_bytes) if ends else None

    def files(self) -> dict[str, int]:
        """Names of all files that are part of the session, each with the fewest bytes it must have."""
        sizes = {blob.file: blob.bytes for blob in self.blobs()}
        if self.layout is None:
            return sizes
        for segment in self.segments:
            sizes[f"index-{segment.number}"] = segment.index_bytes
            sizes |= segment.files(self.layout)
        return sizes

    def blobs(self) -> list[Blob]:
        """The basis and all tails."""
        basis = [self.basis] if self.basis else []
        return [*basis, *(checkpoint.tail for checkpoint in self.checkpoints)]

    # ---- what comes next

    def with_checkpoint(self, checkpoint: Checkpoint) -> Manifest:
        """With a new checkpoint, which replaces an interim one. Only the newest ``MAX_CHECKPOINTS`` stay."""
        kept = self.checkpoints[:-1] if self.current and self.current.interim else self.checkpoints
        return replace(self, commits=self.commits + 1, checkpoints=(*kept, checkpoint)[-MAX_CHECKPOINTS:])

    def without_newest(self) -> Manifest:
        """Without the newest checkpoint. Without any other one the session is empty."""
        if len(self.checkpoints) > 1:
            return replace(self, checkpoints=self.checkpoints[:-1])
        return Manifest(
            created=self.created, used=self.used, encryption=self.encryption, written_bytes=self.written_bytes
        )

    def without_unused_segments(self, is_shared: Callable[[Segment], bool]) -> Manifest:
        """Without segments that no checkpoint refers to. Owned segments end at the last group that is referred to.

        A segment that ``is_shared`` with another session keeps its end, because the other one may refer to more.
        """
        kept = []
        for segment in self.segments:
            found = self.referenced(segment)
            if found is None:
                continue
            if segment.owned and not is_shared(segment):
                segment = replace(segment, high=found[0], index_bytes=found[1])
            kept.append(segment)
        return replace(self, segments=tuple(kept))
