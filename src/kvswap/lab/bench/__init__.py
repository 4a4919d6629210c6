"""Benchmarks: speed, memory and agreement of methods (``kvswap bench``), and the growth of a step with the context."""
