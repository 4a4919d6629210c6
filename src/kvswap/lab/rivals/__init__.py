"""Published methods to compare kvswap with: one file for each, behind the same interface as kvswap's own."""

from kvswap.lab.rivals.registry import NAMES, find

__all__ = ["NAMES", "find"]
