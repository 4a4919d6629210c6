"""Weights as a file has them: GGUF files are mapped, and multiplied without being unpacked.

This room knows nothing of models or caches; it could be a package of its own.
"""
