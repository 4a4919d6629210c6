"""JSON files, replaced in one move so that a reader never sees half of one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(target: Path, content: Any) -> None:
    """Write ``content`` to ``target``."""
    partial = partial_name(target)
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def partial_name(target: Path) -> Path:
    """Where it is written before the move."""
    return target.with_name(f".{target.name}.{os.getpid()}.partial")
