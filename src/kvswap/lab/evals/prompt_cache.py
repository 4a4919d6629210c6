"""Cache computed prompts, so that an evaluation computes each prompt, and each shared beginning, only once.

The last prompt stays in memory, and the next one reuses the beginning that both share, in whole chunks. Prefill is
exact and works in whole chunks, so the result is the same as a computation from the start.

With a folder, every prompt is also stored there, as one safetensors file for each prompt and model: K and V of every
layer as method ``full`` stores them, and the prediction after the prompt. The file name depends on this module's
version, the model and the token ids. One thread.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvswap.core.layer_major import FullCache
from kvswap.disk.atomic import atomic_file
from kvswap.lab.evals.teacher_forcing import share_prompt
from kvswap.models.identity import attention_fingerprint

VERSION = "1"


class PromptCache:
    """Computed prompts of one model: the last one in memory and, where ``folder`` is given, all of them on disk."""

    def __init__(self, folder: Path | None = None) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._ids: Sequence[int] = ()
        self._layers: list[Any] = []

    def fill(self, model: Any, full: FullCache, ids: Sequence[int]) -> torch.Tensor:
        """Fill the empty cache ``full`` with the prompt ``ids``, computing only what is not cached.

        Returns
        -------
        Log-probabilities of the token after the prompt, float32 ``[V]``.
        """
        path = None if self._folder is None else self._path(self._folder, full, ids)
        row = None if path is None else _read(path, full)
        if row is None:
            known = self._reuse_beginning(full, ids)
            self._ids, self._layers = (), []  # free the last prompt: memory is planned for one
            row = share_prompt(model, [full], ids[known:])
            if path is not None:
                _write(path, full, row)
        self._ids, self._layers = ids, [copy.copy(layer) for layer in full.layers]
        return row

    def _reuse_beginning(self, full: FullCache, ids: Sequence[int]) -> int:
        """Put the chunks that the last prompt shares with ``ids`` into ``full``; return their number of tokens."""
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self._ids, ids[:-1], strict=False))
        known = sum(1 for _ in pairs) // full.chunk_tokens * full.chunk_tokens
        if not known or any(layer.is_sliding for layer in self._layers):  # a sliding window lost its beginning
            return 0
        for index, layer in enumerate(self._layers):
            part = full.layers[index] = copy.copy(layer)
            part.keys, part.values = layer.keys[:, :, :known], layer.values[:, :, :known]
        return known

    def _path(self, folder: Path, full: FullCache, ids: Sequence[int]) -> Path:
        parts = full.parts
        digest = hashlib.sha256(f"{VERSION} {attention_fingerprint(parts)} {parts.dtype} {list(ids)}".encode())
        return folder / f"{digest.hexdigest()[:32]}.safetensors"


def _write(path: Path, full: FullCache, row: torch.Tensor) -> None:
    tensors = {"row": row.contiguous()}
    for index, layer in enumerate(full.layers):
        tensors |= {f"{index}.keys": layer.keys.contiguous(), f"{index}.values": layer.values.contiguous()}
        tensors[f"{index}.tokens"] = torch.tensor(layer.get_seq_length())
    with atomic_file(path) as file:
        save_file(tensors, file.name)


def _read(path: Path, full: FullCache) -> torch.Tensor | None:
    """Fill ``full`` from a file and return the prediction ``[V]``, or None where no readable file exists."""
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
