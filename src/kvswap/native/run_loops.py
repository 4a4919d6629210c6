"""All layers of a decode step in one compiled call, which comes back for reads; the structs are those of ``run.c``.

``core/compiled_run.py`` describes the layers once and goes through them in every step. The types are those of
``step_loops``. One thread at a time for one ``Run``; calls release the GIL.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p

import numpy as np
import torch

from kvswap.native.arrays import IntArray
from kvswap.native.step_loops import Layer, Pinned, Pool, Scratch, Sketch, Slots, address_of
from kvswap.native.threads import threaded_library

THROUGH, READS, NOT_FINITE = 1, 0, -2
_Pair = c_int64 * 2
_Addresses = c_void_p * 2


class Window(ctypes.Structure):
    """Where layers with one length of sliding window put and find tokens in a step."""

    _fields_ = (
        *((name, c_void_p) for name in ("newest", "offset", "index", "valid")),
        ("width", c_int64),
        ("last", c_void_p),
    )


class RunLayer(ctypes.Structure):
    """One layer of a run."""

    _fields_ = (
        *((name, c_void_p) for name in ("layer", "sketch", "slots", "pinned")),
        *((name, c_int64) for name in ("order", "count")),
        *((name, c_void_p) for name in ("groups", "window", "cosine", "sine")),
        ("rope_stride", c_int64),
    )
    layer: int
    sketch: int | None
    slots: int
    count: int
    window: int | None
    cosine: int
    sine: int
    rope_stride: int


class _Run(ctypes.Structure):
    _fields_ = (
        ("layers", c_void_p),
        ("count", c_int64),
        *((name, c_void_p) for name in ("pool", "pinned")),
        *((name, c_int64) for name in ("group_tokens", "first")),
        *((name, c_void_p) for name in ("ends", "tail", "offset")),
        *((name, _Pair) for name in ("staging_slot", "staging_address")),
        ("choosing", c_void_p),
        ("floats", c_int64),
        ("out", _Addresses),
        *((name, c_void_p) for name in ("index", "newest", "real", "hidden")),
        *((name, c_int64) for name in ("at", "begun", "chosen")),
        ("reads", _Pair),
        ("selected", c_int64),
        *((name, c_double) for name in ("predict_s", "slots_s")),
    )
    at: int
    chosen: int
    selected: int
    predict_s: float
    slots_s: float
    reads: ctypes.Array[c_int64]


class Run:
    """A run through ``layers`` for the sequences of ``scratch``, each with up to ``most`` chosen groups in a layer.

    Parameters
    ----------
    orders
        Each layer's number among those on disk; None where it keeps a sliding window in memory.
    pinned
        The first pinned slots, ``[B]``, of each layer on disk.
    sinks, ring
        How many groups a layer attends to beside those that are chosen.
    """

    def __init__(
        self,
        layers: list[Layer],
        orders: list[int | None],
        pinned: list[IntArray],
        scratch: Scratch,
        *,
        most: int,
        sinks: int,
        ring: int,
    ) -> None:
        batch, count, compiled = scratch.batch, len(layers), threaded_library()
        self.batch, self.most, self._width = batch, most, sinks + ring
        self.layers = (RunLayer * count)()
        self._groups: IntArray = np.zeros((count, batch * max(1, most)), np.int64)
        self._out: IntArray = np.zeros((2, 11 * batch * most + 3), np.int64)
        self._index = np.zeros(batch * (sinks + most + ring), np.int64)
        self._real, self._newest = np.zeros(2 * self._index.size, np.uint8), np.zeros(batch, np.int64)
        self._scratch, self._described = scratch, layers
        self._pinned = [np.ascontiguousarray(each) for each in pinned]
        for number, (each, layer, order) in enumerate(zip(self.layers, layers, orders, strict=True)):
            each.layer, each.groups = ctypes.addressof(layer), self._groups[number].ctypes.data
            if order is not None:
                each.order, each.pinned = order, address_of(self._pinned[order], (batch,))
        self._run = _Run(layers=ctypes.addressof(self.layers), count=count)
        self._run.out[:] = [each.ctypes.data for each in self._out]
        self._run.index, self._run.newest = self._index.ctypes.data, self._newest.ctypes.data
        self._run.real = self._real.ctypes.data
        self._at, self._step = ctypes.addressof(self._run), ctypes.addressof(scratch.step)
        self._go_on, self._floats = compiled.kvswap_step_run, compiled.kvswap_run_floats
        self._choosing = torch.empty(0)
        self._arrays: tuple[object, ...] = ()

    def describe(self, number: int, count: int, sketch: Sketch | None, slots: Slots) -> None:
        """Have layer ``number`` choose ``count`` groups by ``sketch`` from now on, which are found in ``slots``."""
        if not 0 <= count <= self.most:
            raise ValueError(f"{count} groups for a run that has room for {self.most}")
        each = self.layers[number]
        each.count, each.slots = count, ctypes.addressof(slots)
        each.sketch = None if sketch is None else ctypes.addressof(sketch)

    def describe_window(self, number: int, window: Window, slots: Slots) -> None:
        """Have layer ``number`` attend to its sliding window in ``slots`` in the next step."""
        each = self.layers[number]
        each.window, each.slots = ctypes.addressof(window), ctypes.addressof(slots)

    def use_rope(self, number: int, rope: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Use cos and sin ``[B or 1, 1, d]`` float32 for layer ``number`` in the next step."""
        each = self.layers[number]
        each.cosine, each.sine, each.rope_stride = self._scratch.rope_at(*rope, self._described[number].head_dim)

    def begin(
        self,
        hidden: torch.Tensor,
        pool: Pool,
        pinned: Pinned,
        *,
        group_tokens: int,
        first: int,
        ends: IntArray,
        tail: IntArray,
        offset: IntArray,
        staging_slots: tuple[int, int],
        staging_addresses: tuple[int, int],
    ) -> None:
        """Begin a step at its first layer. ``hidden`` ``[B, 1, E]`` will become its output.

        The tokens ``[B]`` of the step get ``offset`` of slot ``tail``, counted from a layer's first pinned one. Groups
        of ``[first, ends)`` may be chosen. The other arguments are those of ``Scratch.fetch``, for layers with even and
        with odd numbers.
        """
        if pinned.sink_count + pinned.ring_count != self._width:
            raise ValueError(f"{pinned.sink_count} sinks and {pinned.ring_count} newest groups, not {self._width}")
        run, shape = self._run, (self.batch,)
        self._arrays = hidden, pool, pinned, ends, tail, offset
        run.hidden = self._scratch.hidden_at(self._described[0], hidden)
        run.pool, run.pinned = ctypes.addressof(pool), ctypes.addressof(pinned)
        run.group_tokens, run.first = group_tokens, first
        run.ends, run.tail, run.offset = (address_of(each, shape) for each in (ends, tail, offset))
        run.staging_slot[:], run.staging_address[:] = staging_slots, staging_addresses
        run.at = run.begun = run.chosen = run.selected = 0
        run.reads[:] = [0, 0]
        run.predict_s = run.slots_s = 0.0
        floats = self._floats(self._at, self._step)
        if floats > self._choosing.numel():
            self._choosing = torch.empty(floats)
        run.choosing, run.floats = self._choosing.data_ptr(), floats

    def go_on(self) -> int:
        """Run until the end, THROUGH, until reads are to be started or waited for, READS, or NOT_FINITE.

        READS: those of layer ``at`` are to be waited for, and those of the next layer to be started.
        """
        done: int = self._go_on(self._at, self._step)
        if done not in (THROUGH, READS, NOT_FINITE):
            raise ValueError(f"layer {self.chosen}: groups or slots that do not exist, or too little room")
        return done

    @property
    def at(self) -> int:
        """The layer to go on with."""
        return self._run.at

    @property
    def chosen(self) -> int:
        """The layer that groups were chosen for last."""
        return self._run.chosen

    @property
    def selected(self) -> int:
        """Groups of the layers that read nothing."""
        return self._run.selected

    @property
    def predict_s(self) -> float:
        """What choosing groups and looking them up took."""
        return self._run.predict_s

    @property
    def slots_s(self) -> float:
        """What putting together the slots of all groups took."""
        return self._run.slots_s

    def reads(self, number: int) -> int:
        """How many reads layer ``number`` has, the one to go on with or the next."""
        return int(self._run.reads[number % 2])

    def out(self, number: int) -> IntArray:
        """What was planned for that layer, as ``Scratch.fetch`` gives it; a copy."""
        return self._out[number % 2, : 11 * self.batch * self.layers[number].count + 3].copy()

    def groups_of(self, number: int) -> IntArray:
        """Groups ``[B, n]`` that a layer chose in the last step; a copy."""
        count = self.layers[number].count
        return self._groups[number, : self.batch * count].reshape(self.batch, count).copy()
