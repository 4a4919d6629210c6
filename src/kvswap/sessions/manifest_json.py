"""The manifest as text (docs/file-format.md). Whatever is not exactly as the format says is refused.

Pure: ``encode`` takes values and gives text, ``parse`` takes text and gives values. ``parse`` raises DamagedError for
anything malformed and SessionError for a newer version. It allocates no more than a small multiple of the text.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

from kvswap.core.load_or_recompute import Rates
from kvswap.errors import SessionError
from kvswap.sessions.arrays import damaged
from kvswap.sessions.manifest import (
    ITEMSIZES_BYTES,
    MAX_CHECKPOINTS,
    MAX_SEGMENTS,
    Blob,
    Checkpoint,
    Counts,
    Encryption,
    Layout,
    Manifest,
    Model,
    Segment,
)
from kvswap.sessions.seal import text_sum

MAGIC, VERSION = "kvswap-session", 3
LIMIT_BYTES = 16 << 20
_TOKENS = 1 << 31
_FILE = re.compile(r"basis|tail-[0-9]{1,12}")
_HEX = re.compile(r"[0-9a-f]{32}")

_T = TypeVar("_T")


def encode(manifest: Manifest, sign: Callable[[bytes], str]) -> bytes:
    """The text of a manifest; ``sign`` gives what authenticates it, empty where nothing does."""
    values = {"byte_order": "little", **dataclasses.asdict(manifest)}
    body = json.dumps(values, indent=1).encode()
    words = (MAGIC, str(VERSION), text_sum(body), sign(body))
    return f"{' '.join(word for word in words if word)}\n".encode() + body


def parse(data: bytes, label: str) -> Manifest:
    """The manifest in ``data``; ``label`` names the session in messages. Raises DamagedError, SessionError.

    The authentication of an encrypted session is not checked here, since that takes the key: see ``signature``.
    """
    head, _, body = data.partition(b"\n")
    words = head.decode("ascii", errors="replace").split(" ")
    if len(words) not in (3, 4) or words[0] != MAGIC or not words[1].isdecimal():
        raise damaged(label, "its manifest does not begin as one")
    if words[1] not in [str(version) for version in range(1, VERSION + 1)]:
        raise SessionError(
            f"{label} was made by a newer kvswap (format {words[1][:9]}, this one reads 1 to {VERSION})",
            hint="update kvswap; nothing was changed",
        )
    if words[2] != text_sum(body):
        raise damaged(label, "its manifest has another checksum")
    try:
        fields = _Fields(json.loads(body), "manifest")
        manifest = _manifest(fields, int(words[1]))
        if (manifest.encryption is None) != (len(words) == 3):
            raise _Bad("authentication without encryption, or encryption without authentication")
        return manifest
    except (_Bad, ValueError, RecursionError) as error:
        raise damaged(label, f"its manifest is malformed ({error})") from error


def signature(data: bytes) -> tuple[bytes, str]:
    """The part of a manifest that ``encode`` had signed, and the signature, empty where there is none."""
    head, _, body = data.partition(b"\n")
    words = head.decode("ascii", errors="replace").split(" ")
    return body, words[3] if len(words) == 4 else ""


class _Bad(Exception):  # noqa: N818 - becomes a DamagedError
    """A value in the manifest is not as the format says."""


class _Fields:
    """Typed access to one JSON object. A key that is missing, unknown or out of range raises."""

    def __init__(self, values: object, name: str) -> None:
        if not isinstance(values, dict):
            raise _Bad(f"{name} is not an object")
        self._values, self._name = dict(values), name

    def take(self, key: str) -> Any:
        if key not in self._values:
            raise _Bad(f"{self._name} has no {key}")
        return self._values.pop(key)

    def number(self, key: str, low: int = 0, high: int = 1 << 62) -> int:
        return _number(self.take(key), f"{self._name}.{key}", low, high)

    def maybe_number(self, key: str, low: int, high: int) -> int | None:
        value = self.take(key)
        return None if value is None else _number(value, f"{self._name}.{key}", low, high)

    def text(self, key: str) -> str:
        value = self.take(key)
        if not isinstance(value, str) or len(value) > 4096:
            raise _Bad(f"{self._name}.{key} is not text")
        return value

    def flag(self, key: str) -> bool:
        value = self.take(key)
        if not isinstance(value, bool):
            raise _Bad(f"{self._name}.{key} is neither true nor false")
        return value

    def items(self, key: str, most: int) -> list[Any]:
        value = self.take(key)
        if not isinstance(value, list) or len(value) > most:
            raise _Bad(f"{self._name}.{key} is not a list of at most {most}")
        return value

    def counts(self, key: str, layers: int) -> Counts:
        values = self.items(key, layers)
        if len(values) != layers:
            raise _Bad(f"{self._name}.{key} does not have one value for each of {layers} layers")
        return tuple(_number(value, f"{self._name}.{key}", 0, _TOKENS) for value in values)

    def maybe(self, key: str, build: Callable[[_Fields], _T]) -> _T | None:
        value = self.take(key)
        return None if value is None else build(_Fields(value, key))

    def end(self) -> None:
        if self._values:
            raise _Bad(f"{self._name} has an unknown key {next(iter(self._values))!r:.40}")


def _number(value: object, name: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _Bad(f"{name} is not an integer from {low} to {high}")
    return value


def _manifest(fields: _Fields, version: int) -> Manifest:
    if fields.text("byte_order") != "little":
        raise _Bad("another byte order")
    layout = fields.maybe("layout", _layout)
    layers = layout.layers if layout else 0
    manifest = Manifest(
        created=fields.number("created"),
        used=fields.number("used"),
        commits=fields.number("commits"),
        written_bytes=fields.number("written_bytes"),
        encryption=fields.maybe("encryption", _encryption) if version > 1 else None,
        rates=fields.maybe("rates", _rates) if version > 1 else None,
        model=fields.maybe("model", _model),
        layout=layout,
        basis=fields.maybe("basis", _blob),
        segments=tuple(
            _segment(_Fields(value, "segment"), layers, version)
            for value in fields.items("segments", MAX_CHECKPOINTS * MAX_SEGMENTS)
        ),
        checkpoints=tuple(
            _checkpoint(_Fields(value, "checkpoint"), layers) for value in fields.items("checkpoints", MAX_CHECKPOINTS)
        ),
    )
    fields.end()
    _check_whole(manifest)
    return manifest


def _encryption(fields: _Fields) -> Encryption:
    found = Encryption(cipher=fields.text("cipher"), salt=fields.text("salt"), check=fields.text("check"))
    fields.end()
    if found.cipher != "aes-256-gcm" or not _HEX.fullmatch(found.salt) or not _HEX.fullmatch(found.check):
        raise _Bad("its encryption is unknown")
    return found


def _rates(fields: _Fields) -> Rates:
    rates = Rates(**{field.name: fields.number(field.name) for field in dataclasses.fields(Rates)})
    fields.end()
    return rates


def _model(fields: _Fields) -> Model:
    model = Model(**{field.name: fields.text(field.name) for field in dataclasses.fields(Model)})
    fields.end()
    return model


def _layout(fields: _Fields) -> Layout:
    layers = fields.number("layers", 1, 1024)
    dtypes = tuple(fields.items("dtypes", layers))
    if len(dtypes) != layers or len({ITEMSIZES_BYTES.get(d) if isinstance(d, str) else None for d in dtypes}) != 1:
        raise _Bad("layout.dtypes is not one dtype for each layer, all of one size")
    if not isinstance(dtypes[0], str) or dtypes[0] not in ITEMSIZES_BYTES:
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
        raise _Bad(f"{blob.file!r:.40} is not the name of a basis or tail")
    return blob


def _segment(fields: _Fields, layers: int, version: int) -> Segment:
    segment = Segment(
        number=fields.number("number", 0, 10**9),
        owned=fields.flag("owned"),
        start=fields.counts("start", layers),
        high=fields.counts("high", layers),
        index_bytes=fields.number("index_bytes", 0, 1 << 40),
        stripe_groups=fields.maybe_number("stripe_groups", 1, _TOKENS) if version > 2 else None,
    )
    fields.end()
    if any(low > high for low, high in zip(segment.start, segment.high, strict=True)):
        raise _Bad("a segment ends before it starts")
    return segment


def _checkpoint(fields: _Fields, layers: int) -> Checkpoint:
    tail = fields.maybe("tail", _blob)
    if tail is None or not tail.file.startswith("tail-"):
        raise _Bad("a checkpoint has no tail")
    pairs = []
    for pair in fields.items("segments", MAX_SEGMENTS):
        if not isinstance(pair, list) or len(pair) != 2:
            raise _Bad("checkpoint.segments is not a list of pairs")
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
        raise _Bad("some of model, layout, basis and checkpoints are missing")
    numbers = {segment.number: segment for segment in manifest.segments}
    if len(numbers) < len(manifest.segments):
        raise _Bad("two segments have the same number")
    for checkpoint in manifest.checkpoints if layout else ():
        assert layout is not None
        for groups in checkpoint.flushed:
            waiting = checkpoint.tokens - groups * layout.group_tokens
            if not 0 <= waiting <= layout.waiting_groups * layout.group_tokens:
                raise _Bad("a checkpoint has too many or too few tokens for its groups")
        if any(number not in numbers for number, _ in checkpoint.segments):
            raise _Bad("a checkpoint names an unknown segment")
        _check_segments(manifest, checkpoint)


def _check_segments(manifest: Manifest, checkpoint: Checkpoint) -> None:
    if not checkpoint.segments:
        if any(checkpoint.flushed):
            raise _Bad("a checkpoint has groups but no segment")
        return
    found = manifest.ends(checkpoint)
    if any(found[0][0].start):
        raise _Bad("a checkpoint's first segment does not start at the first group")
    for (segment, ends), (_, index_bytes) in zip(found, checkpoint.segments, strict=True):
        if index_bytes > segment.index_bytes:
            raise _Bad("a checkpoint refers to more than there is of an index")
        if any(start < end and end > high for start, end, high in zip(segment.start, ends, segment.high, strict=True)):
            raise _Bad("a checkpoint refers to more groups than a segment has")
