"""The weight files of a checkpoint in a local folder: which they are, what they hold, and what shows a change of them.

Only headers are read, and samples for the identity. Any thread.
"""

from __future__ import annotations

import hashlib
import json
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from kvswap.errors import ModelError

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SAMPLE_BYTES, _SAMPLES = 1 << 18, 16
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Types of floats, by the names of the format. Those of fewer bits are quantised and never converted."""


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads weights from; empty where there are none. Raises OSError, ValueError."""
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    if not (folder / _INDEX).is_file():
        return []
    parts = json.loads((folder / _INDEX).read_bytes())["weight_map"]
    return [folder / part for part in sorted(set(parts.values()))]


def stored_bytes(folder: Path, dtype: torch.dtype | None) -> tuple[int, int] | None:
    """What weights take that stay as their files have them, and what those take that are converted to ``dtype``.

    None where the files cannot be read, which loading them says better.
    """
    kept_bytes = converted_bytes = 0
    try:
        for path in weight_files(folder):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no dictionary
                    tensor = file.get_slice(name)
                    stored, count = _DTYPES.get(tensor.get_dtype()), prod(tensor.get_shape())
                    if stored is None:
                        kept_bytes += count
                    elif dtype in (None, stored):
                        kept_bytes += count * stored.itemsize
                    else:
                        converted_bytes += count * dtype.itemsize
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return kept_bytes, converted_bytes


def checkpoint_identity(source: str, config: Any) -> str:
    """16 hex digits that change with the checkpoint.

    A hub id has its revision. Of a folder, ``config.json`` counts, and size, time and samples of each file of weights.
    """
    folder = Path(source)
    if not folder.is_dir():
        if not (revision := getattr(config, "_commit_hash", None)):
            raise ModelError(f"model {source}: its revision is not known", hint="give a local directory")
        return hashlib.sha256(f"{source} {revision}".encode()).hexdigest()[:16]
    try:
        digest = hashlib.sha256((folder / "config.json").read_bytes())
        for path in weight_files(folder):
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
            with path.open("rb") as data:
                add_samples(digest, data, status.st_size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"model {source}: its weights cannot be read: {error}", hint="the directory needs .safetensors files"
        ) from error
    return digest.hexdigest()[:16]


def add_samples(digest: Any, data: IO[bytes], size_bytes: int) -> None:
    """Add samples over the whole length of a file to a digest. Raises OSError."""
    for number in range(_SAMPLES):
        data.seek(max(0, size_bytes - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
        digest.update(data.read(_SAMPLE_BYTES))
