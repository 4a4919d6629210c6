"""What the processor can do, asked of the system without loading anything heavy. Any thread."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies bfloat16 itself; False where the system does not say."""
    if sys.platform == "darwin":
        return sysctl("hw.optional.arm.FEAT_BF16") == "1"
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = {word for line in lines if line.lower().startswith(("flags", "features")) for word in line.split()}
    return bool(flags & _BFLOAT16_FLAGS)


def sysctl(key: str) -> str:
    """A value that macOS keeps about the machine; empty where there is none."""
    try:
        done = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, timeout=2, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
