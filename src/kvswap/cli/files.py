"""Files that a command writes its numbers to."""

from __future__ import annotations

from pathlib import Path

from kvswap.disk.atomic import try_atomic_file
from kvswap.errors import ConfigError


def check_writable(option: str, path: str) -> Path:
    """Find out before the run, not after it, whether the numbers can be written. Raises ConfigError."""
    target = Path(path).expanduser().absolute()
    if target.is_dir():
        raise ConfigError(f"{option} {path}: a directory", hint="give the name of a file")
    try:
        try_atomic_file(target)
    except OSError as error:
        raise ConfigError(
            f"{option} {path}: cannot be written: {error.strerror}", hint="give a file in a folder of yours"
        ) from error
    return target
