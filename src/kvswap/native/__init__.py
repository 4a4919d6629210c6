"""Compiled loops of the decode path, where the machine that installed this package had a C compiler.

``kernels.c`` is plain C, loaded through ctypes: no JIT, no headers of Python or NumPy, a few kilobytes.
"""
