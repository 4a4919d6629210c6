"""Computed prompts kept on disk, so that methods that are added later need not compute them again.

One safetensors file a prompt and model: K and V of every layer as method ``full`` holds them, and what the prompt
predicts. Files of another version or model have other names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvswap.calibrate import fingerprint
from kvswap.evals.forced import share_prompt
from kvswap.layer_major import FullCache

VERSION = "1"


class PromptShelf:
    """A folder of computed prompts."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def share(self, model: Any, caches: Sequence[Any], ids: Sequence[int]) -> torch.Tensor:
        """``share_prompt``, from the folder if the prompt is there, else into it."""
        full = caches[0]
        assert isinstance(full, FullCache)
        path = self._path(full, ids)
        row = _read(path, full)
        if row is None:
            row = share_prompt(model, caches[:1], ids)
            _write(path, full, row)
        for cache in caches[1:]:
            cache.adopt(full)
        return row

    def _path(self, full: FullCache, ids: Sequence[int]) -> Path:
        parts = full.parts
        digest = hashlib.sha256(f"{VERSION} {fingerprint(parts)} {parts.dtype} {list(ids)}".encode())
        return self._folder / f"{digest.hexdigest()[:32]}.safetensors"


def _write(path: Path, full: FullCache, row: torch.Tensor) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    tensors = {"row": row.contiguous()}
    for index, layer in enumerate(full.layers):
        tensors |= {f"{index}.keys": layer.keys.contiguous(), f"{index}.values": layer.values.contiguous()}
        tensors[f"{index}.tokens"] = torch.tensor(layer.get_seq_length())
    try:
        save_file(tensors, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path, full: FullCache) -> torch.Tensor | None:
    """Fill ``full`` from a file; None where there is none that can be read."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            for index, layer in enumerate(full.layers):
                keys, values = file.get_tensor(f"{index}.keys"), file.get_tensor(f"{index}.values")
                device = full.parts.device
                layer.lazy_initialization(keys[:, :, :0].to(device), values[:, :, :0].to(device))
                layer.keys, layer.values = keys.to(device), values.to(device)
                if layer.is_sliding:
                    layer.cumulative_length = int(file.get_tensor(f"{index}.tokens"))
            row: torch.Tensor = file.get_tensor("row")
            return row
    except (SafetensorError, OSError):
        return None
