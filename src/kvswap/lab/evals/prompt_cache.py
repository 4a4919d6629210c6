"""Cache computed prompts, so that an evaluation computes each prompt, and each shared beginning, only once.

The last prompt stays in memory, and the next one reuses the beginning that both share, in whole chunks. Prefill is
exact and works in whole chunks, so the result is the same as a computation from the start.

With a folder, prompts are also stored there, as one safetensors file for each prompt and model: K and V of every
layer as method ``full`` stores them, the token ids, and the prediction after the prompt. Another prompt reuses the
longest beginning that it shares with any of them. A prompt that adds only ``NEAR_CHUNKS`` chunks to a stored one is not
stored: questions about one text share a file. The file name depends on this module's version, the model and the token
ids. One thread.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvswap.core.layer_major import FullCache
from kvswap.disk.atomic import atomic_file
from kvswap.lab.evals.teacher_forcing import share_prompt
from kvswap.models.adapter import ModelParts
from kvswap.models.identity import attention_fingerprint

VERSION = "2"
NEAR_CHUNKS = 2


class PromptCache:
    """Computed prompts of one model: the last one in memory and, where ``folder`` is given, more of them on disk."""

    def __init__(self, folder: Path | None = None) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._ids: Sequence[int] = ()
        self._layers: list[Any] = []
        self._stored: dict[Path, np.ndarray[Any, Any]] | None = None  # token ids of the files

    def fill(self, model: Any, full: FullCache, ids: Sequence[int]) -> torch.Tensor:
        """Fill the empty cache ``full`` with the prompt ``ids``, computing only what is not cached.

        Returns
        -------
        Log-probabilities of the token after the prompt, float32 ``[V]``.
        """
        path, stored = self._longest(full.parts, full.chunk_tokens, ids)
        row = _read(path, full, stored) if path is not None and stored == len(ids) else None
        if row is None:
            stored = 0 if stored == len(ids) else stored  # the file was damaged since its ids were read
            known = self._begin(full, ids, path, stored)
            self._ids, self._layers = (), []  # free the last prompt: memory is planned for one
            row = share_prompt(model, [full], ids[known:])
            if self._folder is not None and (not stored or len(ids) - stored > NEAR_CHUNKS * full.chunk_tokens):
                self._write(self._folder, full, ids, row)
        self._ids, self._layers = ids, [copy.copy(layer) for layer in full.layers]
        return row

    def fill_again(self, full: FullCache) -> None:
        """Fill the empty cache ``full`` with the last prompt. Nothing is computed or copied."""
        for index, layer in enumerate(self._layers):
            full.layers[index] = copy.copy(layer)

    def stored_tokens(self, parts: ModelParts, chunk_tokens: int, ids: Sequence[int]) -> int:
        """Count the first tokens of ``ids`` that the folder holds: all of them, or whole chunks."""
        return self._longest(parts, chunk_tokens, ids)[1]

    def reusable_tokens(self, parts: ModelParts, chunk_tokens: int, before: Sequence[int], ids: Sequence[int]) -> int:
        """Count the first tokens of ``ids`` that are in memory after the prompt ``before``: whole chunks."""
        return 0 if _forgets(parts) else shared_tokens(before, ids, chunk_tokens)

    def _longest(self, parts: ModelParts, chunk_tokens: int, ids: Sequence[int]) -> tuple[Path | None, int]:
        """Return the file that shares most with ``ids``, and how many tokens of it can be used."""
        best: tuple[Path | None, int] = None, 0
        if self._folder is None:
            return best
        if self._stored is None:
            files = sorted(self._folder.glob(f"{_model_digest(parts)}-*.safetensors"))
            self._stored = {file: known for file in files if (known := _read_ids(file)) is not None}
        for file, known in self._stored.items():
            usable = shared_tokens(known, ids, chunk_tokens)
            if len(known) == len(ids) and np.array_equal(known, ids):
                return file, len(ids)
            if usable > best[1] and not _forgets(parts):
                best = file, usable
        return best

    def _begin(self, full: FullCache, ids: Sequence[int], path: Path | None, stored: int) -> int:
        """Put the beginning that ``ids`` shares with the last prompt or a file into ``full``; return its tokens."""
        known = self.reusable_tokens(full.parts, full.chunk_tokens, self._ids, ids)
        if path is not None and known < stored < len(ids) and _read(path, full, stored) is not None:
            return stored
        if known:
            for index, layer in enumerate(self._layers):
                part = full.layers[index] = copy.copy(layer)
                part.keys, part.values = layer.keys[:, :, :known], layer.values[:, :, :known]
        return known

    def _write(self, folder: Path, full: FullCache, ids: Sequence[int], row: torch.Tensor) -> None:
        tensors = {"row": row.contiguous(), "ids": torch.tensor(ids)}
        for index, layer in enumerate(full.layers):
            tensors |= {f"{index}.keys": layer.keys.contiguous(), f"{index}.values": layer.values.contiguous()}
            tensors[f"{index}.tokens"] = torch.tensor(layer.get_seq_length())
        digest = hashlib.sha256(np.asarray(ids, np.int64).tobytes()).hexdigest()[:32]
        path = folder / f"{_model_digest(full.parts)}-{digest}.safetensors"
        with atomic_file(path) as file:
            save_file(tensors, file.name)
        self._stored = {**(self._stored or {}), path: np.asarray(ids)}


def shared_tokens(known: Sequence[int] | np.ndarray[Any, Any], ids: Sequence[int], chunk_tokens: int) -> int:
    """Count the tokens of the whole chunks at the beginning that two prompts share, less than all of ``ids``."""
    length = min(len(known), len(ids) - 1)
    same = np.asarray(known[:length]) == np.asarray(ids[:length])
    return (length if same.all() else int(same.argmin())) // chunk_tokens * chunk_tokens


def _forgets(parts: ModelParts) -> bool:
    """Whether a layer does not keep all tokens, such as one with a sliding window: then no beginning can be reused."""
    return len(parts.offloaded) < len(parts.layers)


def _model_digest(parts: ModelParts) -> str:
    return hashlib.sha256(f"{VERSION} {attention_fingerprint(parts)} {parts.dtype}".encode()).hexdigest()[:16]


def _read_ids(path: Path) -> np.ndarray[Any, Any] | None:
    """Return the token ids of a file, or None where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            ids: np.ndarray[Any, Any] = file.get_tensor("ids").numpy()
            return ids
    except (SafetensorError, OSError):
        return None


def _read(path: Path, full: FullCache, tokens: int) -> torch.Tensor | None:
    """Fill ``full`` with the first ``tokens`` tokens of a file and return the prediction after all of them ``[V]``.

    Returns None where the file cannot be read.
    """
    found: list[tuple[torch.Tensor, torch.Tensor, int]] = []
    try:
        with safe_open(path, framework="pt") as file:
            for index in range(len(full.layers)):
                keys, values = (file.get_slice(f"{index}.{name}")[:, :, :tokens] for name in ("keys", "values"))
                found.append((keys, values, int(file.get_tensor(f"{index}.tokens"))))
            row: torch.Tensor = file.get_tensor("row")
    except (SafetensorError, OSError):
        return None
    device = full.parts.device
    for layer, (keys, values, seen) in zip(full.layers, found, strict=True):
        layer.lazy_initialization(keys[:, :, :0].to(device), values[:, :, :0].to(device))
        layer.keys, layer.values = keys.to(device), values.to(device)
        if layer.is_sliding:
            layer.cumulative_length = seen
    return row
