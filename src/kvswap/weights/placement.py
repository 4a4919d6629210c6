"""Where a model's weights lie: in pages of a file, which the system drops when it has to, or in memory of the process.

``app`` asks when it measures. On Linux the system's list of mappings tells; elsewhere all weights count as memory of
the process. Any thread.
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path

import torch
from torch import nn


def weight_bytes(model: nn.Module, maps: Path = Path("/proc/self/maps")) -> tuple[int, int]:
    """Bytes of a model's weights that are mapped from files, and those of the others. Tied ones count once."""
    spans = _file_spans(maps)
    starts = [start for start, _ in spans]
    mapped = anonymous = 0
    for tensor in _distinct(model):
        index = bisect_right(starts, tensor.data_ptr()) - 1
        if tensor.device.type == "cpu" and index >= 0 and tensor.data_ptr() < spans[index][1]:
            mapped += tensor.nbytes
        else:
            anonymous += tensor.nbytes
    return mapped, anonymous


def _distinct(model: nn.Module) -> list[torch.Tensor]:
    return list({(tensor.data_ptr(), tensor.shape): tensor for tensor in model.parameters()}.values())


def _file_spans(maps: Path) -> list[tuple[int, int]]:
    """Address ranges that are mapped from files, ascending."""
    found = []
    try:
        lines = maps.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    for line in lines:
        span, _rights, _offset, _device, inode, *_path = line.split(maxsplit=5)
        if inode != "0":
            low, high = span.split("-")
            found.append((int(low, 16), int(high, 16)))
    return sorted(found)
