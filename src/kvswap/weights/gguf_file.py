"""A GGUF file: its metadata, and its tensors as views of the mapped file.

``models`` opens a file here. Every offset and size is checked against the file before a view is made, so that a damaged
file is an error and never a crash. A model in several parts (``NAME-00001-of-00003.gguf``) is opened by any of them.
Read only; any thread. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvswap.errors import ModelError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_MAX_DIMENSIONS = 4
_MAX_ENTRIES = 1 << 20
"""Most tensors, and most keys, of one file. A damaged number beyond is refused before anything is read for it."""
_MAX_VALUES, _MAX_STRING_BYTES = 1 << 24, 1 << 24
"""Most values of an array and bytes of a string: a vocabulary has a million values, a chat template 100 KB."""
_LENGTH = struct.Struct("<Q")
_MAX_DEPTH = 4
"""Most arrays within arrays: Python's stack is finite."""
_ALIGNMENT = "general.alignment"

TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
"""Types of tensors by number: name, weights of a block, bytes of a block."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: its type's number, ``shape`` as PyTorch has it, and its bytes ``[rows, row bytes]`` uint8, mapped."""

    name: str
    type: int
    shape: tuple[int, ...]
    data: torch.Tensor

    @property
    def type_name(self) -> str:
        """What the format calls the type."""
        return TYPES[self.type][0]


@dataclass(frozen=True, slots=True)
class _Identity:
    """What shows that a file is still the one that was mapped."""

    path: Path
    device: int
    inode: int
    size_bytes: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path, status: os.stat_result) -> _Identity:
        return cls(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class MappedFiles:
    """The files that weights are mapped from, as they were then."""

    identities: tuple[_Identity, ...]

    def check_unchanged(self) -> None:
        """Raise ModelError where a file is not the one that was mapped any more: its bytes may be wrong or missing."""
        for known in self.identities:
            try:
                now = _Identity.of(known.path, os.stat(known.path))
            except OSError:
                continue  # a name that is gone does not touch what was mapped
            if (now.device, now.inode) == (known.device, known.inode) and now != known:
                raise ModelError(
                    f"model {known.path}: the file was changed while it was in use", hint="load the model again"
                )


class GgufFile:
    """A model's file, or its parts, opened and checked. Raises ModelError for anything that is wrong with it.

    ``metadata`` has the values by key, ``tensors`` the tensors by name. ``header_digest`` is a hash of the first part's
    header, 64 hex digits.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self.mapped_bytes, self.header_digest = 0, ""
        self._identities: list[_Identity] = []
        parts = _parts(path)
        self.first_path = parts[0]
        for number, part in enumerate(parts):
            metadata, tensors = self._open(part)
            _check_part(part, metadata, number, len(parts))
            if number == 0:
                self.metadata = metadata
            for tensor in tensors:
                if tensor.name in self.tensors:
                    raise _wrong(part, len(parts), f"tensor {tensor.name} is there twice")
                self.tensors[tensor.name] = tensor
        stated = self.metadata.get("split.tensors.count")
        if isinstance(stated, int) and stated != len(self.tensors):
            what = f"there are {len(self.tensors):,} tensors instead of {stated:,}"
            raise _wrong(path, len(parts), what)

    @property
    def architecture(self) -> str:
        """The family, as the format calls it."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def mapped(self) -> MappedFiles:
        """The files behind it, which can be asked whether they are unchanged without keeping their tensors."""
        return MappedFiles(tuple(self._identities))

    def check_unchanged(self) -> None:
        """Raise ModelError where a file is not the one that was mapped any more: its bytes may be wrong or missing."""
        self.mapped.check_unchanged()

    def _open(self, path: Path) -> tuple[dict[str, Any], list[Tensor]]:
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_size < len(MAGIC) or file.read(len(MAGIC)) != MAGIC:
                    raise ModelError(f"model {path}: not a GGUF file", hint="give a model directory or a .gguf file")
                # private and writable, as PyTorch wants it: pages are the file's as long as nobody writes to them
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise ModelError(f"model {path}: {error.strerror}", hint="check the file and its permissions") from error
        self._identities.append(_Identity.of(path, status))
        self.mapped_bytes += len(mapped)
        reader = _Reader(path, mapped)
        try:
            found = reader.read()
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError, ValueError) as error:
            raise _damaged(path, "its header ends early or makes no sense") from error
        self.header_digest = self.header_digest or reader.digest
        return found


class _Reader:
    """Reads the header of one mapped file."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self._path, self._mapped, self._at, self._alignment = path, mapped, len(MAGIC), 1

    @property
    def digest(self) -> str:
        """Hex digits that change with the header."""
        return hashlib.sha256(self._mapped[: self._at]).hexdigest()

    def read(self) -> tuple[dict[str, Any], list[Tensor]]:
        (version,) = self._take("I")
        if version not in _VERSIONS:
            raise ModelError(
                f"model {self._path}: version {version} of GGUF is not known, only {' and '.join(map(str, _VERSIONS))}",
                hint="convert the model again with a current llama.cpp",
            )
        tensors, values = self._take("QQ")
        if max(tensors, values) > _MAX_ENTRIES:
            raise ValueError(f"{tensors} tensors and {values} keys")
        metadata: dict[str, Any] = {}
        for _ in range(values):
            key = self._string()
            metadata[key] = self._value(*self._take("I"))
        infos = [self._info() for _ in range(tensors)]
        alignment = metadata.get(_ALIGNMENT, 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            raise _damaged(self._path, f"{_ALIGNMENT} is {alignment}")
        self._alignment = alignment
        start = -(-self._at // alignment) * alignment
        whole = torch.from_numpy(np.frombuffer(self._mapped, np.uint8))
        return metadata, [self._tensor(whole, start, *info) for info in infos]

    def _take(self, layout: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{layout}", self._mapped, self._at)
        self._at += struct.calcsize(f"<{layout}")
        return found

    def _string(self) -> str:
        start = self._at + 8
        (length,) = struct.unpack_from("<Q", self._mapped, self._at)
        self._at = start + length
        if length > _MAX_STRING_BYTES or self._at > len(self._mapped):
            raise ValueError(f"a string of {length} bytes")
        return self._mapped[start : self._at].decode("utf-8")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._take(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth == _MAX_DEPTH:
            raise ValueError(f"a value of type {kind} at depth {depth}")
        each, count = self._take("IQ")
        if count > _MAX_VALUES:
            raise ValueError(f"an array of {count} values")
        if each in _SCALARS:
            return list(self._take(f"{count}{_SCALARS[each]}"))
        if each == _STRING:
            return self._strings(count)
        return [self._value(each, depth + 1) for _ in range(count)]

    def _strings(self, count: int) -> list[str]:
        """``count`` strings. Vocabularies have some hundred thousand, for which ``_string`` would take a second."""
        mapped, at, size, length_at = self._mapped, self._at, len(self._mapped), _LENGTH.unpack_from
        found: list[str] = []
        for _ in range(count):
            (length,) = length_at(mapped, at)
            start, at = at + 8, at + 8 + length
            if length > _MAX_STRING_BYTES or at > size:
                raise ValueError(f"a string of {length} bytes")
            found.append(str(mapped[start:at], "utf-8"))
        self._at = at
        return found

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (dimensions,) = self._take("I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"{dimensions} dimensions")
        shape = tuple(reversed(self._take(f"{dimensions}Q")))
        kind, offset = self._take("IQ")
        return name, shape, kind, offset

    def _tensor(
        self, whole: torch.Tensor, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int
    ) -> Tensor:
        if kind not in TYPES:
            raise ModelError(
                f"model {self._path}: tensor {name} has type {kind}, which is not known",
                hint="take a file of another type, such as Q4_K_M or Q8_0",
            )
        type_name, block, block_bytes = TYPES[kind]
        columns = shape[-1] if shape else 1
        if columns % block or not prod(shape):
            raise _damaged(self._path, f"tensor {name} has shape {shape}, which {type_name} cannot have")
        row_bytes = columns // block * block_bytes
        rows = prod(shape[:-1])
        if offset % self._alignment:
            raise _damaged(self._path, f"tensor {name} begins at {offset}, which is not aligned")
        first = start + offset
        if first + rows * row_bytes > len(whole):
            raise _damaged(self._path, f"tensor {name} reaches past the end of the file, which is incomplete")
        data = whole[first : first + rows * row_bytes].view(rows, row_bytes)
        return Tensor(name, kind, shape, data)


def _parts(path: Path) -> list[Path]:
    """All parts of a model in order. Raises ModelError that names a part that is missing."""
    found = _PART.fullmatch(path.name)
    if found is None:
        return [path]
    stem, count = found[1], int(found[3])
    parts = [path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing or not parts:
        raise ModelError(
            f"model {path}: missing of its {count} parts: {', '.join(missing[:3])}",
            hint="fetch the missing parts into the same folder",
        )
    return parts


def _check_part(path: Path, metadata: dict[str, Any], number: int, count: int) -> None:
    """Raise ModelError where a file says that it is another part than its name says, or a part of another model."""
    stated_count, stated_number = metadata.get("split.count"), metadata.get("split.no")
    if count == 1 and isinstance(stated_count, int) and stated_count > 1:
        raise ModelError(
            f"model {path}: it is one of {stated_count} parts, which its name does not say",
            hint=f"name the parts NAME-00001-of-{stated_count:05}.gguf and so on, in one folder",
        )
    if stated_count is not None and stated_count != count:
        raise _wrong(path, count, f"{path.name} is one of {stated_count} parts")
    if count > 1 and stated_number is not None and stated_number != number:
        raise _wrong(path, count, f"by its content {path.name} has another number ({stated_number}, from 0 on)")


def _wrong(path: Path, parts: int, what: str) -> ModelError:
    """The error about tensors that do not belong together."""
    if parts == 1:
        return _damaged(path, what)
    return ModelError(
        f"model {path}: its {parts} parts do not belong together: {what}", hint="fetch all parts of one model again"
    )


def _damaged(path: Path, what: str) -> ModelError:
    return ModelError(f"model {path}: the GGUF file is damaged: {what}", hint="fetch it again")
