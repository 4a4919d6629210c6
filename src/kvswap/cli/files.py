"""Checks of the files that a command writes its results to."""

from __future__ import annotations

from pathlib import Path

from kvswap.disk.atomic import try_atomic_file
from kvswap.disk.folders import user_path
from kvswap.errors import ConfigError


def check_writable(option: str, path: str) -> Path:
    """Check before a run that its results can be written to ``path``; return the absolute path. Raises ConfigError."""
    target = user_path(path).absolute()
    if target.is_dir():
        raise ConfigError(f"{option} {path}: a directory, not a file", hint="give the name of a file")
    try:
        try_atomic_file(target)
    except OSError as error:
        raise ConfigError(
            f"{option} {path}: cannot be written: {error.strerror}", hint="give a file in a writable folder that exists"
        ) from error
    return target
