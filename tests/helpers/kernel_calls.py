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


@dataclass
class Struct:
    """A struct, and the arrays whose addresses belong at some of its bytes."""

    value: ctypes.Structure
    pointers: dict[int, np.ndarray]


@dataclass
class Scratch:
    """Working memory of so many bytes: what is left in it does not count."""

    size_bytes: int


Argument = int | float | None | np.ndarray | Struct | Scratch


@dataclass
class Call:
    """A function without its prefix, and its arguments. Floats may be off by ``bound`` times the largest one."""

    name: str
    arguments: list[Argument]
    bound: float = 0.0
    kind: int = 0
    """Forced kind of products, which a processor may not have; the function then returns 0."""
    buffers: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        """Find all buffers, those that others point at first."""
        self._items: list[tuple[int, Any, dict[int, int]]] = []
        self.buffers, self.counts = [], []
        pointed: dict[int, int] = {}
        for argument in self.arguments:
            if isinstance(argument, Struct):
                for array in argument.pointers.values():
                    if id(array) not in pointed:
                        pointed[id(array)] = len(self._items)
                        self._add(3, array, True)
        for argument in self.arguments:
            if isinstance(argument, float):
                self._items.append((1, argument, {}))
            elif argument is None or isinstance(argument, int):
                self._items.append((0, argument or 0, {}))
            elif isinstance(argument, Scratch):
                self._add(2, np.zeros(argument.size_bytes, np.uint8), False)
            elif isinstance(argument, Struct):
                places = {place: pointed[id(array)] for place, array in argument.pointers.items()}
                self._add(2, np.frombuffer(bytes(argument.value), np.uint8), False, places)
            else:
                self._add(2, argument, True)

    def _add(self, kind: int, array: np.ndarray, counts: bool, places: dict[int, int] | None = None) -> None:
        self._items.append((kind, np.ascontiguousarray(array), places or {}))
        self.buffers.append(self._items[-1][1])
        self.counts.append(counts)

    def written(self) -> bytes:
        """The call as the program reads it."""
        parts = [f"kvswap_{self.name}".encode().ljust(64, b"\0"), struct.pack("=q", len(self._items))]
        for kind, value, places in self._items:
            if kind < 2:
                number = value if kind == 0 else struct.unpack("=q", struct.pack("=ff", value, 0.0))[0]
                parts.append(struct.pack("=qq", kind, number))
                continue
            parts.append(struct.pack("=qqq", kind, value.nbytes, len(places)))
            parts += [struct.pack("=qq", *place) for place in places.items()]
            parts.append(value.tobytes())
        return b"".join(parts)

    def here(self) -> tuple[int, list[np.ndarray]]:
        """What the library that is loaded returns, and the buffers as it leaves them."""
        owners, addresses, results, values = [], [], [], []
        for kind, value, places in self._items:
            if kind < 2:
                addresses.append(value)
                values.append(value)
                continue
            owner = np.zeros(value.nbytes + _ALIGNMENT_BYTES, np.uint8)
            start = -owner.ctypes.data % _ALIGNMENT_BYTES
            inside = owner[start : start + value.nbytes]
            inside[:] = np.frombuffer(value.tobytes(), np.uint8)
            for place, earlier in places.items():
                inside[place : place + 8] = np.array([addresses[earlier]], np.int64).view(np.uint8)
            owners.append(owner)
            addresses.append(inside.ctypes.data)
            results.append(inside)
            if kind == 2:
                values.append(inside.ctypes.data)
        function = required_library()[f"kvswap_{self.name}"]  # a new one, whose types nobody else sees
        function.argtypes = [
            (ctypes.c_int64, ctypes.c_float, ctypes.c_void_p)[kind] for kind, *_ in self._items if kind < 3
        ]
        function.restype = ctypes.c_int64
        return function(*values), results


def run_calls(program: list[str], calls: Iterable[Call], folder: Path) -> Iterator[tuple[int, list[np.ndarray]]]:
    """The same of each call, from the program that was built of ``call_kernels.c``."""
    calls, given, found = list(calls), folder / "calls", folder / "results"
    given.write_bytes(b"".join(call.written() for call in calls))
    done = subprocess.run([*program, str(given), str(found)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    bytes_left, place = found.read_bytes(), 0
    for call in calls:
        returned = struct.unpack_from("=q", bytes_left, place)[0]
        place += 8
        buffers = []
        for array in call.buffers:
            buffers.append(np.frombuffer(bytes_left, np.uint8, array.nbytes, place))
            place += array.nbytes
        yield returned, buffers
    assert place == len(bytes_left)


def build_program(compiler: list[str], folder: Path) -> Path:
    """``call_kernels.c`` and all compiled functions, by a compiler with its options; warnings are errors."""
    program = folder / "call_kernels"
    sources = [*sorted(NATIVE.glob("*.c")), Path(__file__).with_name("call_kernels.c")]
    options = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-rdynamic", f"-I{NATIVE}", "-o", str(program)]
    command = [*compiler, *options, *map(str, sources), "-lm", "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return program
