"""How a session comes into being: complete under a passing name, then renamed. A kill leaves only the passing name."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvswap.disk.atomic import sync_folder
from kvswap.disk.private import told

PARTIAL = ".new-"


def partial_path(path: Path) -> Path:
    """A passing name for the session that will be ``path``."""
    return path.with_name(f"{PARTIAL}{secrets.token_hex(8)}")


@contextmanager
def making(root: Path, *, alone: bool = False) -> Iterator[None]:
    """Hold ``root`` while a session is made in it, lest it is taken for a leftover; ``alone``, to remove those."""
    with told(f"folder {root} cannot be held"):
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


def move_into_place(partial: Path, path: Path) -> None:
    """Give a complete session its name, durably."""
    with told(f"session {path.name} cannot get its name"):
        os.rename(partial, path)
        sync_folder(path.parent)
