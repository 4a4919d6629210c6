"""Measuring and comparing: benchmarks, evaluation, and the published methods (rivals)."""
