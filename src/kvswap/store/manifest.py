"""What a session's manifest says (docs/file-format.md), as values; reading refuses whatever is not exactly that.

Pure: text in, values out. ``parse`` raises DamagedError for anything malformed and SessionError for a newer version;
it never allocates more than a small multiple of the text.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from kvswap.errors import DamagedError, SessionError
from kvswap.store.checksum import text_sum
from kvswap.terms import KVGeometry, ceil_div, round_up

MAGIC, VERSION = "kvswap-session", 1
LIMIT_BYTES = 16 << 20
CHECKPOINTS = 8
SEGMENTS = 32
ITEMSIZES_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_TOKENS = 1 << 31
_FILE = re.compile(r"basis|tail-[0-9]{1,12}")

Counts = tuple[int, ...]
_T = TypeVar("_T")


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
    def basis_rows(self) -> int:
        """Rows of one layer's basis: one an element, twice that and five for a transform."""
        elements = self.kv_heads * self.head_dim
        return 2 * elements + 5 if self.sketch_kind == "transform" else elements

    @property
    def waiting_groups(self) -> int:
        """Most groups of a layer that may not be on disk yet, the rolling tail included."""
        return ceil_div(self.recent_tokens, self.group_tokens) + ceil_div(self.sink_tokens, self.group_tokens) + 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """A small file that is read whole: its name, length and checksum."""

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


def encode(manifest: Manifest) -> bytes:
    """The manifest as it is written."""
    values = {"byte_order": "little", **dataclasses.asdict(manifest)}
    body = json.dumps(values, indent=1).encode()
    return f"{MAGIC} {VERSION} {text_sum(body)}\n".encode() + body


def parse(data: bytes, what: str) -> Manifest:
    """The manifest in ``data``; ``what`` names the session in messages. Raises DamagedError, SessionError."""
    head, _, body = data.partition(b"\n")
    words = head.decode("ascii", errors="replace").split(" ")
    if len(words) != 3 or words[0] != MAGIC or not words[1].isdecimal():
        raise _damaged(what, "its manifest does not begin as one")
    if words[1] != str(VERSION):
        raise SessionError(
            f"{what} was made by a newer kvswap (format {words[1][:9]}, this one reads {VERSION})",
            hint="update kvswap; nothing was changed",
        )
    if words[2] != text_sum(body):
        raise _damaged(what, "its manifest has another checksum")
    try:
        return _manifest(_Fields(json.loads(body), "manifest"))
    except (_Bad, ValueError, RecursionError) as error:
        raise _damaged(what, f"its manifest is malformed ({error})") from error


def _damaged(what: str, why: str) -> DamagedError:
    return DamagedError(f"{what} is damaged: {why}", hint="try: kvswap sessions repair")


class _Bad(Exception):  # noqa: N818 - becomes a DamagedError
    """Something in the manifest is not as the format says."""


class _Fields:
    """Typed access to one JSON object; whatever is missing, left over or out of range raises."""

    def __init__(self, values: object, name: str) -> None:
        if not isinstance(values, dict):
            raise _Bad(f"{name} is no object")
        self._values, self._name = dict(values), name

    def take(self, key: str) -> Any:
        if key not in self._values:
            raise _Bad(f"{self._name} has no {key}")
        return self._values.pop(key)

    def number(self, key: str, low: int = 0, high: int = 1 << 62) -> int:
        return _number(self.take(key), f"{self._name}.{key}", low, high)

    def text(self, key: str) -> str:
        value = self.take(key)
        if not isinstance(value, str) or len(value) > 4096:
            raise _Bad(f"{self._name}.{key} is no text")
        return value

    def flag(self, key: str) -> bool:
        value = self.take(key)
        if not isinstance(value, bool):
            raise _Bad(f"{self._name}.{key} is neither true nor false")
        return value

    def items(self, key: str, most: int) -> list[Any]:
        value = self.take(key)
        if not isinstance(value, list) or len(value) > most:
            raise _Bad(f"{self._name}.{key} is no list of at most {most}")
        return value

    def counts(self, key: str, layers: int) -> Counts:
        values = self.items(key, layers)
        if len(values) != layers:
            raise _Bad(f"{self._name}.{key} is not for {layers} layers")
        return tuple(_number(value, f"{self._name}.{key}", 0, _TOKENS) for value in values)

    def maybe(self, key: str, build: Callable[[_Fields], _T]) -> _T | None:
        value = self.take(key)
        return None if value is None else build(_Fields(value, key))

    def end(self) -> None:
        if self._values:
            raise _Bad(f"{self._name} has an unknown key {next(iter(self._values))!r:.40}")


def _number(value: object, name: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _Bad(f"{name} is no number from {low} to {high}")
    return value


def _manifest(fields: _Fields) -> Manifest:
    if fields.text("byte_order") != "little":
        raise _Bad("another byte order")
    layout = fields.maybe("layout", _layout)
    layers = layout.layers if layout else 0
    manifest = Manifest(
        created=fields.number("created"),
        used=fields.number("used"),
        commits=fields.number("commits"),
        written_bytes=fields.number("written_bytes"),
        model=fields.maybe("model", _model),
        layout=layout,
        basis=fields.maybe("basis", _blob),
        segments=tuple(
            _segment(_Fields(value, "segment"), layers) for value in fields.items("segments", CHECKPOINTS * SEGMENTS)
        ),
        checkpoints=tuple(
            _checkpoint(_Fields(value, "checkpoint"), layers) for value in fields.items("checkpoints", CHECKPOINTS)
        ),
    )
    fields.end()
    _check_whole(manifest)
    return manifest


def _model(fields: _Fields) -> Model:
    model = Model(**{field.name: fields.text(field.name) for field in dataclasses.fields(Model)})
    fields.end()
    return model


def _layout(fields: _Fields) -> Layout:
    layers = fields.number("layers", 1, 1024)
    dtypes = tuple(fields.items("dtypes", layers))
    if len(dtypes) != layers or len({ITEMSIZES_BYTES.get(d) if isinstance(d, str) else None for d in dtypes}) != 1:
        raise _Bad("layout.dtypes are not one dtype a layer, of equal size")
    if dtypes[0] not in ITEMSIZES_BYTES:
        raise _Bad("layout.dtypes has an unknown dtype")
    layout = Layout(
        layers=layers,
        dtypes=dtypes,
        kv_heads=fields.number("kv_heads", 1, 1024),
        head_dim=fields.number("head_dim", 1, 4096),
        group_tokens=fields.number("group_tokens", 1, 64),
        alignment_bytes=fields.number("alignment_bytes", 1, 1 << 16),
        sketch_rank=fields.number("sketch_rank", 1, 1 << 22),
        sketch_bits=fields.number("sketch_bits", 1, 8),
        sketch_kind=fields.text("sketch_kind"),
        sink_tokens=fields.number("sink_tokens", 0, 1 << 20),
        recent_tokens=fields.number("recent_tokens", 0, 1 << 20),
    )
    fields.end()
    known = layout.sketch_bits in (2, 4, 8) and layout.sketch_kind in ("identity", "transform")
    whole = layout.sketch_rank <= layout.kv_heads * layout.head_dim and not layout.sketch_rank * layout.sketch_bits % 8
    if not known or not whole or layout.alignment_bytes % 512:
        raise _Bad("layout has an impossible sketch or alignment")
    return layout


def _blob(fields: _Fields) -> Blob:
    blob = Blob(file=fields.text("file"), bytes=fields.number("bytes", 0, 1 << 40), xxh3=fields.text("xxh3"))
    fields.end()
    if not _FILE.fullmatch(blob.file):
        raise _Bad(f"{blob.file!r:.40} is no name of basis or tail")
    return blob


def _segment(fields: _Fields, layers: int) -> Segment:
    segment = Segment(
        number=fields.number("number", 0, 10**9),
        owned=fields.flag("owned"),
        start=fields.counts("start", layers),
        high=fields.counts("high", layers),
        index_bytes=fields.number("index_bytes", 0, 1 << 40),
    )
    fields.end()
    if any(low > high for low, high in zip(segment.start, segment.high, strict=True)):
        raise _Bad("a segment ends before it begins")
    return segment


def _checkpoint(fields: _Fields, layers: int) -> Checkpoint:
    tail = fields.maybe("tail", _blob)
    if tail is None or not tail.file.startswith("tail-"):
        raise _Bad("a checkpoint has no tail")
    pairs = []
    for pair in fields.items("segments", SEGMENTS):
        if not isinstance(pair, list) or len(pair) != 2:
            raise _Bad("checkpoint.segments holds something else than pairs")
        pairs.append((_number(pair[0], "segment", 0, 10**9), _number(pair[1], "index", 0, 1 << 40)))
    checkpoint = Checkpoint(
        commit=fields.number("commit"),
        interim=fields.flag("interim"),
        tokens=fields.number("tokens", 1, _TOKENS),
        flushed=fields.counts("flushed", layers),
        tail=tail,
        segments=tuple(pairs),
    )
    fields.end()
    return checkpoint


def _check_whole(manifest: Manifest) -> None:
    layout = manifest.layout
    if len({manifest.model is None, layout is None, manifest.basis is None, not manifest.checkpoints}) > 1:
        raise _Bad("model, layout, basis and checkpoints must come together")
    numbers = {segment.number: segment for segment in manifest.segments}
    if len(numbers) < len(manifest.segments):
        raise _Bad("two segments have one number")
    for checkpoint in manifest.checkpoints if layout else ():
        assert layout is not None
        for groups in checkpoint.flushed:
            waiting = checkpoint.tokens - groups * layout.group_tokens
            if not 0 <= waiting <= layout.waiting_groups * layout.group_tokens:
                raise _Bad("a checkpoint's tokens do not fit its groups")
        if any(number not in numbers for number, _ in checkpoint.segments):
            raise _Bad("a checkpoint names an unknown segment")
        _check_segments(manifest, checkpoint)


def _check_segments(manifest: Manifest, checkpoint: Checkpoint) -> None:
    if not checkpoint.segments:
        if any(checkpoint.flushed):
            raise _Bad("a checkpoint has groups and no segment")
        return
    found = manifest.ends(checkpoint)
    if any(found[0][0].start):
        raise _Bad("a checkpoint's first segment does not begin at the first group")
    for (segment, ends), (_, index_bytes) in zip(found, checkpoint.segments, strict=True):
        if index_bytes > segment.index_bytes:
            raise _Bad("a checkpoint reaches past an index")
        if any(start < end and end > high for start, end, high in zip(segment.start, ends, segment.high, strict=True)):
            raise _Bad("a checkpoint reaches past a segment")
