"""Evaluations (``kvswap eval``): answers and next-token distributions of methods, compared with full attention."""
