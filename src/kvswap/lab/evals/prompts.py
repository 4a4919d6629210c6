"""Computed prompts: what the last one had in common with the next is not computed again, and all may be kept on disk.

Prefill is exact and goes in whole chunks, so a prompt that goes on from the chunks of another is what it would be if it
were computed from its start. On disk it is one safetensors file a prompt and model: K and V of every layer as method
``full`` holds them, and what the prompt predicts. Files of another version or model have other names.
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
from kvswap.lab.evals.forced import share_prompt
from kvswap.models.identity import attention_fingerprint

VERSION = "1"


class PromptShelf:
    """Prompts of one model; in ``folder`` all of them, else the last one alone, in memory."""

    def __init__(self, folder: Path | None = None) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._ids: Sequence[int] = ()
        self._layers: list[Any] = []

    def fill(self, model: Any, full: FullCache, ids: Sequence[int]) -> torch.Tensor:
        """Give an empty cache the prompt ``ids``.

        Returns
        -------
        Log-probabilities ``[V]`` float32 of the token after the prompt.
        """
        path = None if self._folder is None else self._path(self._folder, full, ids)
        row = None if path is None else _read(path, full)
        if row is None:
            known = self._begin(full, ids)
            self._ids, self._layers = (), []  # two prompts in memory would be one too many
            row = share_prompt(model, [full], ids[known:])
            if path is not None:
                _write(path, full, row)
        self._ids, self._layers = ids, [copy.copy(layer) for layer in full.layers]
        return row

    def _begin(self, full: FullCache, ids: Sequence[int]) -> int:
        """Give ``full`` the chunks that the last prompt shares with ``ids``; how many tokens that is."""
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self._ids, ids[:-1], strict=False))
        known = sum(1 for _ in pairs) // full.chunk_tokens * full.chunk_tokens
        if not known or any(layer.is_sliding for layer in self._layers):  # a window has dropped its beginning
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
