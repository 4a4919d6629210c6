"""The memory limit of a cgroup, and the description of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvswap.memory import available
from kvswap.memory.available import MemoryLimit, memory_limit
from kvswap.tuning import machine
from kvswap.tuning.machine import Gpu, cores, describe_machine, find_gpu

MIB = 1 << 20
NO_LIMIT_V1 = 0x7FFFFFFFFFFFF000


class Hierarchy:
    """A /proc of this process and a mounted hierarchy of one version, in a temporary folder."""

    def __init__(self, root: Path, version: int, path: str, mounted: str = "/") -> None:
        self.root, self.version = root, version
        mount = root / "cgroup"
        (root / "proc" / "self").mkdir(parents=True)
        mount.mkdir()
        kind = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,memory"
        other = f"30 20 0:20 / {root}/cpu rw - cgroup cgroup rw,cpu"
        line = f"31 20 0:21 {mounted} {mount} rw,nosuid shared:1 - {kind}"
        (root / "proc" / "self" / "mountinfo").write_text(f"20 1 8:1 / / rw - ext4 /dev/sda rw\n{other}\n{line}\n")
        groups = f"3:cpu:/elsewhere\n0::{path}\n" if version == 2 else f"3:cpu:/elsewhere\n4:memory:{path}\n0::/\n"
        (root / "proc" / "self" / "cgroup").write_text(groups)

    def group(self, path: str, limit: int | str, used: int = 0, cached: int = 0) -> None:
        folder = self.root / "cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        second = self.version == 2
        (folder / ("memory.max" if second else "memory.limit_in_bytes")).write_text(f"{limit}\n")
        (folder / ("memory.current" if second else "memory.usage_in_bytes")).write_text(f"{used}\n")
        prefix = "" if second else "total_"
        lines = [f"{prefix}inactive_file {cached // 2}", f"{prefix}active_file {cached - cached // 2}", "anon 7"]
        (folder / "memory.stat").write_text("\n".join(lines) + "\n")

    def found(self) -> MemoryLimit | None:
        return memory_limit(self.root / "proc")


@pytest.mark.parametrize("version", [1, 2])
def test_limit_of_own_group(version: int, tmp_path: Path) -> None:
    system = Hierarchy(tmp_path, version, "/app")
    system.group("app", 512 * MIB, used=100 * MIB, cached=30 * MIB)
    assert system.found() == MemoryLimit(limit_bytes=512 * MIB, used_bytes=70 * MIB)


@pytest.mark.parametrize("version", [1, 2])
def test_a_smaller_limit_of_a_parent_group_applies(version: int, tmp_path: Path) -> None:
    system = Hierarchy(tmp_path, version, "/slice/app/inner")
    system.group("slice/app/inner", "max" if version == 2 else NO_LIMIT_V1)
    system.group("slice/app", 900 * MIB)
    system.group("slice", 700 * MIB, used=5 * MIB)
    system.group("other", 100 * MIB)
    assert system.found() == MemoryLimit(limit_bytes=700 * MIB, used_bytes=5 * MIB)


@pytest.mark.parametrize("version", [1, 2])
def test_no_limit(version: int, tmp_path: Path) -> None:
    system = Hierarchy(tmp_path, version, "/app")
    system.group("app", "max" if version == 2 else NO_LIMIT_V1)
    assert system.found() is None


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("path", "mounted"), [("/docker/abc", "/docker/abc"), ("/docker/abc/app", "/docker/abc"), ("/", "/elsewhere")]
)
def test_container_sees_a_part_of_the_hierarchy(version: int, path: str, mounted: str, tmp_path: Path) -> None:
    system = Hierarchy(tmp_path, version, path, mounted)
    system.group("", 256 * MIB)
    assert system.found() == MemoryLimit(limit_bytes=256 * MIB, used_bytes=0)


def test_no_cgroups(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) is None


def test_cores_are_those_of_the_process() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity here")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert cores() == len(before)


def test_memory_limit_binds_and_leaves_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_gpu", Gpu)
    monkeypatch.setattr(available, "memory_limit", lambda: MemoryLimit(limit_bytes=10 * MIB, used_bytes=4 * MIB))
    found = describe_machine()
    assert (found.memory_limit_bytes, found.memory_available_bytes) == (10 * MIB, 6 * MIB)
    assert available.available_bytes() == 6 * MIB
    monkeypatch.setattr(available, "memory_limit", lambda: MemoryLimit(limit_bytes=1 << 59, used_bytes=0))
    found = describe_machine()
    assert found.memory_limit_bytes is None
    assert found.memory_available_bytes > 10 * MIB


@pytest.mark.parametrize(
    ("version", "hardware", "note"),
    [
        ("", "", "not installed"),
        ("2.13.0+cpu", "", ""),
        ("2.13.0+cpu", "an NVIDIA GPU is there", "built without GPUs"),
    ],
)
def test_gpu_without_loading_torch(version: str, hardware: str, note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version_of", lambda package: version)
    monkeypatch.setattr(machine, "_gpu_hardware", lambda: hardware)
    monkeypatch.setattr(machine, "_torch_gpu", pytest.fail)
    found = find_gpu()
    assert found.name == ""
    assert note in found.note
    assert bool(found.note) is bool(note)


@pytest.mark.parametrize("error", [OSError("libcuda is broken"), ImportError("libcudart is missing")])
def test_broken_torch_is_a_note(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Gpu:
        raise error

    monkeypatch.setattr(machine, "version_of", lambda package: "2.13.0")
    monkeypatch.setattr(machine, "_torch_gpu", fail)
    assert str(error) in find_gpu().note


def test_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version_of", lambda package: "2.13.0")
    monkeypatch.setattr(machine, "_torch_gpu", lambda: None)
    monkeypatch.setattr(machine, "_gpu_hardware", lambda: "an NVIDIA GPU is there")
    assert "cannot use it" in find_gpu().note
