"""A decode step of one decoder layer in compiled calls: the reads that it will need, its K and V, its output.

``core/compiled_step.py`` describes the layers once, and calls these functions for each layer of each step. The
structs are those of ``step.h``. Hidden states are ``[B, 1, E]`` float32 or bfloat16 on the CPU, contiguous; everything
else is float32. One thread at a time for one ``Scratch``; calls release the GIL. Arguments that would reach outside
of what was given raise ValueError, and nothing is done.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int64, c_void_p
from typing import Any

import numpy as np
import torch

from kvswap.native.array_loops import SlotArrays
from kvswap.native.arrays import BoolArray, IntArray
from kvswap.native.library import available as available
from kvswap.native.threads import threaded_library
from kvswap.native.weight_loops import Matrix

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 30
"""Types of elements, by the numbers of GGUF."""
TYPES = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
SILU, GELU_TANH = 0, 1
_LINE_BYTES = 64


class Linear(ctypes.Structure):
    """A matrix and its bias ``[rows]``, or None."""

    _fields_ = (("matrix", Matrix), ("bias", c_void_p))


class Norm(ctypes.Structure):
    """A root-mean-square norm times ``weight + offset``; without a weight there is none."""

    _fields_ = (("weight", c_void_p), ("offset", c_float), ("eps", c_float))


class Layer(ctypes.Structure):
    """One decoder layer."""

    _fields_ = (
        *((name, c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim", "inner", "activation")),
        ("scaling", c_float),
        *((name, Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, Norm) for name in ("input", "q_norm", "k_norm", "after_attention", "before_mlp", "after_mlp")),
    )


class Slots(ctypes.Structure):
    """All slots of groups, ``slot_bytes`` apart."""

    _fields_ = (
        ("data", c_void_p),
        ("count", c_int64),
        ("slot_bytes", c_int64),
        ("type", c_int64),
        ("group_tokens", c_int64),
    )


class Tally(ctypes.Structure):
    """What steps attended to; see ``selection/tally.py``."""

    _fields_ = (
        *((name, c_void_p) for name in ("groups", "squares")),
        ("columns", c_int64),
        ("kept", c_double),
        ("choices", c_int64),
    )
    groups: int
    squares: int
    columns: int
    kept: float
    choices: int


class Step(ctypes.Structure):
    """What is the same for all layers of a step."""

    _fields_ = (
        *((name, c_int64) for name in ("batch", "workers", "type", "rope_stride")),
        ("cosine", c_void_p),
        ("sine", c_void_p),
        ("scratch", c_void_p),
        ("scratch_bytes", c_int64),
        ("tally", c_void_p),
    )


class Sketch(ctypes.Structure):
    """Packed codes of one layer's keys, and how a query is made to fit them; see ``choose.c``."""

    _fields_ = (
        ("codes", c_void_p),
        *((name, c_int64) for name in ("sequence_bytes", "tile_bytes", "tiles", "rows", "bits", "few")),
        *((name, c_void_p) for name in ("projection", "scales", "tokens")),
        *((name, c_int64) for name in ("flat", "fine")),
    )


class Pool(ctypes.Structure):
    """Where groups are found in memory, and how those that are not are read; see ``choose.c``."""

    _fields_ = (
        ("table", c_void_p),
        *((name, c_int64) for name in ("rows", "columns", "first")),
        ("powers", c_void_p),
        ("longest", c_int64),
        *((name, c_void_p) for name in ("worth", "seen", "visits")),
        *((name, c_int64) for name in ("gap", "places", "slot_bytes")),
    )
    arrays: SlotArrays

    @classmethod
    def of(cls, arrays: SlotArrays, *, first: int, gap: int, places: int, slot_bytes: int) -> Pool:
        """The pool of ``arrays``; the other arguments are those of ``array_loops.find``."""
        table = arrays.table, arrays.rows, arrays.columns, first, arrays.powers, arrays.longest
        pool = cls(*table, arrays.worth, arrays.seen, arrays.visits, gap, places, slot_bytes)
        pool.arrays = arrays  # keeps their memory alive
        return pool


class Pinned(ctypes.Structure):
    """Slots of sinks and newest groups, which are the same for every layer of a step; see ``attention.c``."""

    _fields_ = (
        *((name, c_void_p) for name in ("sinks", "ring", "sinks_real", "ring_real")),
        *((name, c_int64) for name in ("sink_count", "ring_count")),
    )
    sink_count: int
    ring_count: int
    arrays: tuple[np.ndarray[Any, Any], ...]

    @classmethod
    def of(cls, sinks: IntArray, ring: IntArray, sinks_real: BoolArray, ring_real: BoolArray) -> Pinned:
        """From slots ``[B, sinks]`` and ``[B, ring]``, counted from a layer's first one, and which hold a group."""
        arrays = tuple(map(np.ascontiguousarray, (sinks, ring, sinks_real, ring_real)))
        pinned = cls(*(address_of(each, each.shape) for each in arrays), sinks.shape[1], ring.shape[1])
        pinned.arrays = arrays  # keeps their memory alive
        return pinned


class Scratch:
    """Memory and arguments of the steps of ``batch`` sequences through ``layers``, hidden states of ``dtype``.

    ``tally`` is the address of a ``Tally`` that takes what is chosen.
    """

    def __init__(self, layers: list[Layer], batch: int, dtype: torch.dtype, tally: int | None = None) -> None:
        self.workers, compiled = torch.get_num_threads(), threaded_library()
        sizes = [compiled.kvswap_step_bytes(ctypes.byref(layer), batch, self.workers) for layer in layers]
        if min(sizes, default=0) <= 0:
            raise ValueError("a layer whose heads do not fit")
        self._memory = torch.empty(max(sizes) + _LINE_BYTES, dtype=torch.uint8)
        address = -(-self._memory.data_ptr() // _LINE_BYTES) * _LINE_BYTES
        self.step = Step(batch, self.workers, TYPES[dtype], 0, None, None, address, max(sizes), tally)
        self._rope: tuple[torch.Tensor, torch.Tensor] | None = None
        self.batch, self.dtype = batch, dtype
        self._at = ctypes.addressof(self.step)
        self._query, self._begin = compiled.kvswap_step_query, compiled.kvswap_step_begin
        self._finish = compiled.kvswap_step_finish
        self._fetch, self._choose_floats = compiled.kvswap_step_fetch, compiled.kvswap_choose_floats
        self._attended = compiled.kvswap_attended

    def use_rope(self, cos: torch.Tensor, sin: torch.Tensor, head_dim: int) -> None:
        """Use RoPE by cos and sin ``[B or 1, 1, d]`` float32 from now on."""
        if self._rope is not None and self._rope[0] is cos and self._rope[1] is sin:
            return
        step = self.step
        step.cosine, step.sine, step.rope_stride = self.rope_at(cos, sin, head_dim)
        self._rope = cos, sin

    def rope_at(self, cos: torch.Tensor, sin: torch.Tensor, head_dim: int) -> tuple[int, int, int]:
        """Addresses of cos and sin ``[B or 1, 1, d]`` float32, and elements from one sequence to the next."""
        rows = len(cos)
        if cos.dtype != torch.float32 or sin.dtype != torch.float32 or rows not in (1, self.batch):
            raise ValueError(f"cos {tuple(cos.shape)} {cos.dtype} and sin {sin.dtype} for {self.batch} sequences")
        if not cos.shape == sin.shape == (rows, 1, head_dim) or not (cos.is_contiguous() and sin.is_contiguous()):
            raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} for heads of {head_dim} elements")
        return cos.data_ptr(), sin.data_ptr(), head_dim if rows > 1 else 0

    def query(self, layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
        """The query ``[B, H_q, d]`` that ``layer`` is predicted to have."""
        found = torch.empty(self.batch, layer.heads, layer.head_dim)
        self._check(self._query(ctypes.addressof(layer), self._at, self.hidden_at(layer, hidden), found.data_ptr()))
        return found

    def fetch(
        self,
        layer: Layer,
        hidden: torch.Tensor,
        sketch: Sketch | None,
        pool: Pool,
        *,
        order: int,
        group_tokens: int,
        first: int,
        ends: IntArray,
        count: int,
        staging_slot: int,
        staging_address: int,
    ) -> tuple[int, IntArray] | None:
        """Choose groups for ``layer``, look them up, and plan the reads of those that are not in memory.

        Parameters
        ----------
        hidden
            Input of this layer or the one before, from which its query is predicted.
        sketch, first, ends, count
            The ``count`` best groups of ``[first, ends[b])`` by that query, ascending; where there are fewer, the
            number of all groups fills up. Without a sketch, all of ``count`` groups from ``first`` on.
        pool, order
            Where groups are in memory, and the layer's number among those on disk.
        staging_slot, staging_address
            Where groups are read to.

        Returns
        -------
        How many reads there are, and int64 ``(11 * B * count + 3,)``: the groups, then what ``kvswap_find`` writes
        (``array_loops.found``). None where a score is not a number.
        """
        at, codes = ctypes.addressof(layer), None if sketch is None else ctypes.addressof(sketch)
        floats = 0 if codes is None else self._choose_floats(at, self._at, codes, group_tokens)
        scratch, out = torch.empty(floats), np.empty(11 * self.batch * count + 3, np.int64)
        reads = self._fetch(
            at,
            self._at,
            self.hidden_at(layer, hidden),
            codes,
            group_tokens,
            first,
            address_of(ends, (self.batch,)),
            count,
            scratch.data_ptr(),
            floats,
            ctypes.addressof(pool),
            order,
            staging_slot,
            staging_address,
            address_of(out, out.shape),
        )
        if reads == -1:
            raise ValueError("groups that the sketch or the table does not have, or too few places to read them to")
        return None if reads < 0 else (reads, out)

    def attended(
        self, pinned: Pinned, first: IntArray, chosen: IntArray, real: BoolArray | None
    ) -> tuple[IntArray, BoolArray | None]:
        """All slots that a layer attends to, ``[B, W]`` in order of position, and which are real, None: all.

        ``first`` ``[B]`` are the layer's first pinned slots, ``chosen`` ``[B, n]`` the slots of its chosen groups, of
        which those in ``real`` ``[B, n]`` are real, None: all.
        """
        count = chosen.shape[1]
        shape = self.batch, pinned.sink_count + count + pinned.ring_count
        index, all_real = np.empty(shape, np.int64), np.empty(shape, np.bool_)
        complete = self._attended(
            ctypes.addressof(pinned),
            self.batch,
            address_of(first, (self.batch,)),
            address_of(chosen, (self.batch, count)),
            None if real is None else address_of(real, (self.batch, count)),
            count,
            address_of(index, shape),
            address_of(all_real, shape),
        )
        return index, None if complete else all_real

    def begin(self, layer: Layer, hidden: torch.Tensor, slots: Slots, pinned: IntArray, offset: IntArray) -> None:
        """Compute query, K and V; the newest K, V go to ``offset`` of slot ``pinned``, both ``[B]``."""
        self._check(
            self._begin(
                ctypes.addressof(layer),
                self._at,
                self.hidden_at(layer, hidden),
                ctypes.addressof(slots),
                address_of(pinned, (self.batch,)),
                address_of(offset, (self.batch,)),
            )
        )

    def finish(
        self,
        layer: Layer,
        hidden: torch.Tensor,
        slots: Slots,
        index: IntArray,
        valid: BoolArray | None,
        offset: IntArray,
    ) -> torch.Tensor:
        """The output of ``layer``, shaped like its input ``hidden``, after ``begin``.

        The query attends to groups in slots ``index`` ``[B, W]`` in order of position, of which those in ``valid`` are
        real, None: all. The last is the newest, whose last token is at ``offset`` ``[B]``.
        """
        output = torch.empty_like(hidden)
        width = index.shape[1]
        self._check(
            self._finish(
                ctypes.addressof(layer),
                self._at,
                ctypes.addressof(slots),
                address_of(index, (self.batch, width)),
                None if valid is None else address_of(valid, (self.batch, width)),
                width,
                address_of(offset, (self.batch,)),
                output.data_ptr(),
            )
        )
        return output

    def hidden_at(self, layer: Layer, hidden: torch.Tensor) -> int:
        """Address of hidden states that ``layer`` can take. Raises ValueError for others."""
        shape = hidden.shape
        if shape[0] != self.batch or shape[1] != 1 or shape[2] != layer.hidden or hidden.dtype != self.dtype:
            raise ValueError(f"hidden states {tuple(hidden.shape)} {hidden.dtype} for {self.batch} sequences")
        if not hidden.is_contiguous():
            raise ValueError("hidden states that are not contiguous")
        return hidden.data_ptr()

    @staticmethod
    def _check(done: int) -> None:
        if not done:
            raise ValueError("slots that do not exist, or too little scratch")


def address_of(array: np.ndarray[Any, Any], shape: tuple[int, ...]) -> int:
    """Address of the first of its int64 or bytes. Raises ValueError for an array of another shape or kind."""
    if array.shape != shape or not array.flags.c_contiguous or array.itemsize not in (1, 8):
        raise ValueError(f"an array {array.shape} of {array.dtype}, not {shape}")
    address: int = array.__array_interface__["data"][0]  # a third of the time of array.ctypes.data
    return address
