"""Parsing and printing of sizes, rates and times: memory in KiB/MiB/GiB, disk rates in MB/s (10^6 bytes)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from kvswap.errors import ConfigError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_FACTORS = {
    "": 1,
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "k": KIB,
    "m": MIB,
    "g": GIB,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str | int, *, name: str = "size") -> int:
    """Bytes meant by ``text``: ``24MiB``, ``1.5GiB``, ``500MB`` or a plain count.

    Raises ConfigError when it is not a positive size.
    """
    match = _SIZE.fullmatch(str(text))
    factor = _FACTORS.get(match[2].lower()) if match else None
    count = float(match[1]) * factor if match and factor else 0.0
    value = int(count) if math.isfinite(count) else 0
    if value <= 0:
        raise ConfigError(f"{name}: {text!r} is not a size", hint="write a number with a unit, such as 24MiB or 1.5GiB")
    return value


def format_bytes(count_bytes: float) -> str:
    """Memory or file size for people: ``20.4 MiB``."""
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count_bytes) >= factor:
            return f"{count_bytes / factor:.1f} {unit}"
    return f"{int(count_bytes)} B"


def format_parts(parts: Mapping[str, int]) -> str:
    """Named parts and their sizes for people, largest first: ``sketch 10.2 MiB, write queue 1.0 MiB``."""
    largest = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in largest if size)


def format_rate(bytes_per_s: float) -> str:
    """Disk rate for people, in powers of ten: ``226 MB/s``."""
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.0f} MB/s"


def format_us(seconds: float) -> str:
    """Short duration for people: ``85 us``, ``1.25 ms``."""
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def format_s(seconds: float) -> str:
    """Duration for people: ``850 ms``, ``12.3 s``, ``2 min 5 s``."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"
