"""Compiled loops of the decode path, where a C compiler was found when this package was installed.

The sources are plain C, loaded through ctypes: no JIT, no headers of Python or NumPy, a few kilobytes. The modules here
check arguments and call them; each loop has an equivalent in NumPy or torch, which runs where nothing was compiled.
"""
