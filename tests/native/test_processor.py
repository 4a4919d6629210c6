"""Whether bfloat16 is the processor's own, on Linux and on macOS."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvswap.native import processor
from kvswap.native.processor import has_bfloat16, sysctl


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name\t: Fast\nflags\t\t: fpu avx2 avx512_bf16\n", True),
        ("flags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags : fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("model name\t: Fast\nflags\t\t: fpu avx2 avx512f avx512_bf16x\n", False),
        ("flags : fpu avx2\nmodel name : bf16\n", False),
        ("", False),
    ],
)
def test_flags_of_linux(text: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert has_bfloat16(file) is expected
    assert has_bfloat16(tmp_path / "absent") is False


@pytest.mark.parametrize(("answer", "expected"), [("1", True), ("0", False), ("", False)])
def test_macos_is_asked(answer: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(processor, "sysctl", lambda key: asked.append(key) or answer)
    assert has_bfloat16() is expected
    assert asked == ["hw.optional.arm.FEAT_BF16"]


def test_system_without_sysctl(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: object, **options: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", absent)
    assert sysctl("any") == ""
