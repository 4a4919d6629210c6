"""Calls of compiled functions with all that their arguments point at, made here or by another build.

``call_kernels.c`` is the program of that build, and describes the files between the two.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvswap.native.library import required_library

NATIVE = Path(__file__).parents[2] / "src" / "kvswap" / "native"
_ALIGNMENT_BYTES = 64


BFLOAT16 = np.dtype([("bfloat16", np.uint16)])
"""The type of an array whose elements are bfloat16."""


@dataclass
class Struct:
    """A struct, and what has its address at some of the struct's bytes."""

    value: ctypes.Structure
    pointers: dict[int, np.ndarray | Scratch | Struct]


@dataclass
class Scratch:
    """Working memory of so many bytes: what is left in it does not count."""

    size_bytes: int


Argument = int | float | None | np.ndarray | Struct | Scratch


@dataclass
class Call:
    """A function without its prefix, and its arguments. Floats may be off by ``bound`` times the largest one.

    ``then`` are functions that are called after it. What is the same object in several places is one buffer.
    """

    name: str
    arguments: list[Argument]
    bound: float = 0.0
    kind: int = 0
    """Forced kind of products, which a processor may not have; the function then returns 0."""
    then: list[tuple[str, list[Argument]]] = field(default_factory=list)
    buffers: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        """Find all items, those that others point at first."""
        self._items: list[tuple[int, Any, dict[int, int]]] = []
        self.buffers, self.counts = [], []
        self._numbers: dict[int, int] = {}
        self._functions = [
            (name, [self._number(each) for each in arguments])
            for name, arguments in [(self.name, self.arguments), *self.then]
        ]

    def _number(self, argument: Argument) -> int:
        """The item of an argument, which is added where it is new."""
        if isinstance(argument, float):
            self._items.append((1, argument, {}))
        elif argument is None or isinstance(argument, int):
            self._items.append((0, argument or 0, {}))
        elif id(argument) in self._numbers:
            return self._numbers[id(argument)]
        else:
            if isinstance(argument, Scratch):
                self._add(np.zeros(argument.size_bytes, np.uint8), False)
            elif isinstance(argument, Struct):
                places = {place: self._number(each) for place, each in argument.pointers.items()}
                self._add(np.frombuffer(bytes(argument.value), np.uint8), False, places)
            else:
                self._add(argument, True)
            self._numbers[id(argument)] = len(self._items) - 1
        return len(self._items) - 1

    def _add(self, array: np.ndarray, counts: bool, places: dict[int, int] | None = None) -> None:
        self._items.append((2, np.ascontiguousarray(array), places or {}))
        self.buffers.append(self._items[-1][1])
        self.counts.append(counts)

    @property
    def names(self) -> list[str]:
        """The functions, in the order in which they are called."""
        return [name for name, _ in self._functions]

    def written(self) -> bytes:
        """The call as the program reads it."""
        parts = [struct.pack("=q", len(self._items))]
        for kind, value, places in self._items:
            if kind < 2:
                number = value if kind == 0 else struct.unpack("=q", struct.pack("=ff", value, 0.0))[0]
                parts.append(struct.pack("=qq", kind, number))
                continue
            parts.append(struct.pack("=qqq", kind, value.nbytes, len(places)))
            parts += [struct.pack("=qq", *place) for place in places.items()]
            parts.append(value.tobytes())
        parts.append(struct.pack("=q", len(self._functions)))
        for name, numbers in self._functions:
            parts += [f"kvswap_{name}".encode().ljust(64, b"\0"), struct.pack("=q", len(numbers))]
            parts.append(np.array(numbers, np.int64).tobytes())
        return b"".join(parts)

    def here(self) -> tuple[list[int], list[np.ndarray]]:
        """What the library that is loaded returns, and the buffers as it leaves them."""
        owners, values, results = [], [], []
        for kind, value, places in self._items:
            if kind < 2:
                values.append(value)
                continue
            owner = np.zeros(value.nbytes + _ALIGNMENT_BYTES, np.uint8)
            start = -owner.ctypes.data % _ALIGNMENT_BYTES
            inside = owner[start : start + value.nbytes]
            inside[:] = np.frombuffer(value.tobytes(), np.uint8)
            for place, earlier in places.items():
                inside[place : place + 8] = np.array([values[earlier]], np.int64).view(np.uint8)
            owners.append(owner)
            values.append(inside.ctypes.data)
            results.append(inside)
        returned = []
        for name, numbers in self._functions:
            function = required_library()[f"kvswap_{name}"]  # a new one, whose types nobody else sees
            types = (ctypes.c_int64, ctypes.c_float, ctypes.c_void_p)
            function.argtypes = [types[self._items[number][0]] for number in numbers]
            function.restype = ctypes.c_int64
            returned.append(function(*(values[number] for number in numbers)))
        return returned, results


def run_calls(program: list[str], calls: Iterable[Call], folder: Path) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """The same of each call, from the program that was built of ``call_kernels.c``."""
    calls, given, found = list(calls), folder / "calls", folder / "results"
    given.write_bytes(b"".join(call.written() for call in calls))
    done = subprocess.run([*program, str(given), str(found)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    bytes_left, place = found.read_bytes(), 0
    for call in calls:
        returned = list(struct.unpack_from(f"={len(call.names)}q", bytes_left, place))
        place += 8 * len(returned)
        buffers = []
        for array in call.buffers:
            buffers.append(np.frombuffer(bytes_left, np.uint8, array.nbytes, place))
            place += array.nbytes
        yield returned, buffers
    assert place == len(bytes_left)


def as_floats(found: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
    """The bytes of a buffer as float64; None where its elements are no floats."""
    if dtype == BFLOAT16:
        return (found.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(float)
    return found.view(dtype).astype(float) if dtype in (np.float32, np.float16) else None


def build_program(compiler: list[str], folder: Path) -> Path:
    """``call_kernels.c`` and all compiled functions, by a compiler with its options; warnings are errors."""
    program = folder / "call_kernels"
    sources = [*sorted(NATIVE.glob("*.c")), Path(__file__).with_name("call_kernels.c")]
    options = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-rdynamic", f"-I{NATIVE}", "-o", str(program)]
    command = [*compiler, *options, *map(str, sources), "-lm", "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return program
