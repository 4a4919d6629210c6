"""The one account of memory that lives through decode. Nothing is allocated before it is reserved here."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvswap.errors import MemoryBudgetError
from kvswap.units import format_bytes


@dataclass(slots=True)
class Ledger:
    """Bytes reserved for each part, never more than ``limit_bytes`` together.

    Parts: basis, sketch, tables, tails, staging, scratch, write_queue, slots.
    """

    limit_bytes: int
    reserved: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    peak_bytes: int = 0

    @property
    def reserved_bytes(self) -> int:
        """Bytes reserved now, over all parts."""
        return sum(self.reserved.values())

    @property
    def free_bytes(self) -> int:
        """Bytes that may still be reserved."""
        return self.limit_bytes - self.reserved_bytes

    def reserve(self, part: str, count_bytes: int) -> None:
        """Take ``count_bytes`` for ``part``. Raises MemoryBudgetError, and takes nothing, past the limit."""
        if count_bytes > self.free_bytes:
            needed = self.reserved_bytes + count_bytes
            raise MemoryBudgetError(
                f"kv_memory: {part} needs {format_bytes(count_bytes)} more, {format_bytes(self.free_bytes)} of "
                f"{format_bytes(self.limit_bytes)} are left",
                minimum_bytes=needed,
                longest_tokens=0,
                hint=f"set kv_memory to at least {format_bytes(needed)} or generate fewer tokens",
            )
        self.reserved[part] = self.reserved.get(part, 0) + count_bytes
        self.peaks[part] = max(self.peaks.get(part, 0), self.reserved[part])
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)

    def reserve_all(self, parts: dict[str, int]) -> None:
        """Take bytes for several parts, all or nothing. Raises MemoryBudgetError past the limit."""
        needed = sum(parts.values())
        if needed > self.free_bytes:
            self.reserve(max(parts, key=lambda part: parts[part]), needed)
        for part, count_bytes in parts.items():
            self.reserve(part, count_bytes)

    def release(self, part: str, count_bytes: int) -> None:
        """Give ``count_bytes`` of ``part`` back."""
        if count_bytes > self.reserved.get(part, 0):
            raise ValueError(f"{part}: {count_bytes} bytes given back of {self.reserved.get(part, 0)}")
        self.reserved[part] = self.reserved.get(part, 0) - count_bytes
