"""Where reads for slots on another device arrive: two halves in host memory, copied over one at a time.

The memory is aligned as direct reads need, and pinned for CUDA, where a side stream copies. ``memory/slots.py`` calls
it, in the thread that runs the model. Half 0 or 1 is read into again only after ``wait``.
"""

from __future__ import annotations

import torch

from kvswap.disk.slab import Slab


class DeviceStaging:
    """``memory`` uint8 ``[2 * half_bytes]``, at ``address``."""

    def __init__(self, device: torch.device, half_bytes: int) -> None:
        self._half_bytes = half_bytes
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":  # pinned memory begins at a page
            self.memory = torch.zeros(2 * half_bytes, dtype=torch.uint8, pin_memory=True)
            self._stream = torch.cuda.Stream(device)
        else:
            self.memory = torch.from_numpy(Slab(2 * half_bytes).array)[: 2 * half_bytes]
        self.address = self.memory.data_ptr()
        self._copied: list[torch.cuda.Event | None] = [None, None]

    def publish(self, half: int, target: torch.Tensor) -> None:
        """Copy the beginning of a half to ``target`` uint8 ``[n]`` on the device; later work there waits for it."""
        start = half * self._half_bytes
        arrived = self.memory[start : start + len(target)]
        if self._stream is None:
            target.copy_(arrived)
            return
        current = torch.cuda.current_stream(target.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            target.copy_(arrived, non_blocking=True)
        current.wait_stream(self._stream)
        self._copied[half] = self._stream.record_event()

    def wait(self, half: int) -> None:
        """Wait until what ``publish`` copies from a half is copied."""
        event, self._copied[half] = self._copied[half], None
        if event is not None:
            event.synchronize()
