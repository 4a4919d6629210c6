"""The throttle says in one line what it cannot do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "throttle.py"


def throttle(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=60, check=False)


def test_without_limits_or_a_command_it_says_how_to_call_it() -> None:
    for words in (["--emmc"], ["--", "true"], ["--read-mbps", "5", "--", "true"]):
        result = throttle(*words)
        assert result.returncode == 2 and "give --emmc, --sd" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_it_works_or_says_why_not(tmp_path: Path) -> None:
    result = throttle("--sd", "--dir", str(tmp_path), "--", sys.executable, "-c", "print('ran'); raise SystemExit(7)")
    if result.returncode == 7:
        assert os.geteuid() == 0 and result.stdout == "ran\n"
    else:
        assert result.returncode == 1 and result.stdout == ""
        assert result.stderr.startswith("throttle: not possible here: ") and len(result.stderr.splitlines()) == 1
