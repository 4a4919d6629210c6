"""Whether a model's weights fit into memory, decided before they are loaded. Arithmetic only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvswap.errors import MemoryBudgetError
from kvswap.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightNeeds:
    """What weights take.

    ``file_bytes`` can stay in the pages of their file, which the system drops when it has to. ``made_bytes`` are made
    of the file's when they are loaded, so that memory has to hold them; ``why`` says how, as in "when they are
    unpacked". ``smaller`` says which weights would take less.
    """

    file_bytes: int
    made_bytes: int = 0
    why: str = ""
    smaller: str


def check_that_it_fits(
    name: str, needs: WeightNeeds, *, mmap: bool, free_bytes: int, notice: Callable[[str], None]
) -> None:
    """Raise MemoryBudgetError where a model cannot fit; say so where it fits only as far as it is mapped."""
    all_bytes, free = needs.file_bytes + needs.made_bytes, format_bytes(free_bytes)
    if not mmap and all_bytes > free_bytes:
        raise MemoryBudgetError(
            f"model {name}: its weights take {format_bytes(all_bytes)}, {free} of memory are free",
            hint=f"leave --no-mmap out, close other programs, or {needs.smaller}",
        )
    if needs.made_bytes > free_bytes:
        raise MemoryBudgetError(
            f"model {name}: its weights take {format_bytes(needs.made_bytes)} {needs.why}, {free} of memory are free",
            hint=f"close other programs, or {needs.smaller}",
        )
    if all_bytes > free_bytes:
        notice(
            f"model {name}: its weights take {format_bytes(all_bytes)} and {free} of memory "
            "are free, so every token reads some of them from disk again"
        )
