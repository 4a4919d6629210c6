"""kvswap and what it is compared with, one file a method, behind ``kvswap.selection.method``."""
