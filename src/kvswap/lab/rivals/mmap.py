"""K and V in files mapped into memory: the operating system pages them, as it does for llama.cpp's weights.

Attention is full and exact, in the model's dtype. While memory is free, all of it is in the page cache; under pressure
the kernel drops pages and reads them again, in the order of its own. Files have no names once they are mapped. What is
mapped is not limited, so ``kv_memory_peak_bytes`` is what there is to page.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import torch

from kvswap.config import Config
from kvswap.core.layer_major import FullCache, InMemory, InMemoryLayer, Progress, stock_layers
from kvswap.disk.files import check_free, open_unlinked, prepare_dir
from kvswap.disk.folders import kv_folder
from kvswap.errors import UnsupportedError
from kvswap.models.adapter import ModelParts
from kvswap.terms import round_up

GROWTH_TOKENS = 1024


def method() -> InMemory:
    """Full attention over mapped files."""
    return InMemory(name="mmap", open=open_cache)


def open_cache(parts: ModelParts, implementation: str, config: Config, on_progress: Progress | None) -> FullCache:
    """A cache in mapped files in ``config.kv_dir``. Raises StorageError."""
    folder = prepare_dir(kv_folder(config.kv_dir))
    layers = [
        MappedLayer(folder) if part.order is not None else stock
        for part, stock in zip(parts.layers, stock_layers(parts), strict=True)
    ]
    return MappedCache(folder, parts, implementation, layers, chunk_tokens=config.chunk_tokens, on_progress=on_progress)


class MappedCache(FullCache):
    """Full attention over files in a folder."""

    def __init__(self, folder: Path, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._folder = folder

    def adopt(self, source: FullCache) -> None:
        """Copy what ``source`` holds into the files."""
        super().adopt(source)
        for part in self.parts.offloaded:
            layer = source.layers[part.index]
            self.layers[part.index] = MappedLayer(self._folder)
            self.layers[part.index].update(layer.keys, layer.values)


class MappedLayer(InMemoryLayer):
    """One layer's K, V in two mapped files, with room for more tokens; replaced by larger ones when that is used up."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._room: list[torch.Tensor] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take new K, V ``[B, H_kv, n, d]``; returns all so far, as views of the files."""
        if key_states.device.type != "cpu":
            raise UnsupportedError("mmap on a device other than the CPU", hint="use method full there")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        if not self._room or stop > self._room[0].shape[2]:
            larger = [self._map(states, stop) for states in (key_states, value_states)]
            for new, old in zip(larger, self._room, strict=False):
                new[:, :, :start] = old[:, :, :start]
            self._room = larger
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:stop] = states
        self.keys, self.values = (room[:, :, :stop] for room in self._room)
        return self.keys, self.values

    def _map(self, states: torch.Tensor, tokens: int) -> torch.Tensor:
        batch, heads, new, head_dim = states.shape
        # a prompt arrives in chunks: twice the room each time keeps the copying in bounds
        capacity = round_up(tokens + max(tokens - new, 0), GROWTH_TOKENS)
        size_bytes = batch * heads * capacity * head_dim * states.element_size()
        check_free(self._folder, size_bytes)
        descriptor = open_unlinked(self._folder, size_bytes, False)
        with open(descriptor, "r+b") as file:  # the mapping outlives the descriptor
            mapped = mmap.mmap(file.fileno(), size_bytes)
        return torch.frombuffer(mapped, dtype=states.dtype).view(batch, heads, capacity, head_dim)
