"""``kvswap doctor`` reports correct facts in time, and leaves nothing on the disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvswap.cli.doctor import doctor
from kvswap.disk import DirectProbe, create_backend
from kvswap.disk.uring_ring import Ring
from kvswap.errors import ConfigError, DiskReadError, StorageError
from kvswap.tuning.checkup import check_up
from tests.helpers.system import has_direct_io

MEMORY_FOLDER = Path("/dev/shm")


def run(*words: str) -> Result:
    return CliRunner().invoke(doctor, words)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file and a short read test, for tests that do not check the rates."""
    monkeypatch.setitem(check_up.__kwdefaults__, "file_bytes", 1 << 20)
    monkeypatch.setitem(check_up.__kwdefaults__, "read_s", 0.05)


def refuse_ring(self: Ring, depth: int) -> None:
    raise PermissionError(1, "Operation not permitted")


def refuse_direct(folder: object) -> DirectProbe:
    return DirectProbe(ok=False, alignment_bytes=0, memory_alignment_bytes=0, filesystem="zfs", reason="EINVAL (zfs)")


def test_whole_run_in_time_and_nothing_left(tmp_path: Path) -> None:
    folder, report = tmp_path / "new" / "kv", tmp_path / "report.json"
    started = time.perf_counter()
    result = run("--kv-dir", str(folder), "--json", str(report))
    assert result.exit_code == 0, result.output
    assert time.perf_counter() - started < 10
    assert os.listdir(tmp_path) == ["report.json"]
    found = json.loads(report.read_text())
    assert (found["format"], found["version"]) == ("kvswap-doctor", 1)
    assert set(found) == {"format", "version", "machine", "folder", "read_test", "read_test_reason", "verdict"}
    assert found["machine"]["cores"] == len(os.sched_getaffinity(0)) if sys.platform == "linux" else True
    backend = create_backend("auto", tmp_path, 8, on_notice=lambda text: None)
    assert (found["folder"]["backend"], found["folder"]["direct_io"]) == (backend.name, backend.direct)
    backend.close()
    assert found["folder"]["path"] == str(folder)
    test = found["read_test"]
    assert test["page_cache"] is not has_direct_io(tmp_path)
    for name, read_bytes, depth in (("small", 16384, 64), ("large", 65536, 64), ("single", 16384, 1)):
        rate = test[name]
        assert (rate["read_bytes"], rate["depth"]) == (read_bytes, depth)
        assert rate["bytes_per_s"] == pytest.approx(rate["reads"] * read_bytes / rate["elapsed_s"])
        assert rate["reads_per_s"] == pytest.approx(rate["reads"] / rate["elapsed_s"])
    assert 0.5 < test["small"]["elapsed_s"] + test["large"]["elapsed_s"] + test["single"]["elapsed_s"] < 8
    assert 0 < test["single"]["latency_p50_us"] <= test["single"]["latency_p99_us"]
    assert result.output.splitlines()[-1].strip().startswith("to do")
    assert found["verdict"]["summary"] in result.output


def test_existing_folder_stays(tmp_path: Path, brief: None) -> None:
    folder = tmp_path / "kv"
    folder.mkdir()
    (folder / "mine").write_text("kept")
    assert run("--kv-dir", str(folder)).exit_code == 0
    assert os.listdir(folder) == ["mine"]


def test_default_folder_is_the_users_cache(tmp_path: Path, brief: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    result = run()
    assert str(tmp_path / "kvswap" / "kv") in result.output
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("under", [False, True])
def test_folder_that_is_a_file(under: bool, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("mine")
    result = run("--kv-dir", str(blocker / "kv" if under else blocker))
    assert isinstance(result.exception, StorageError)
    assert result.exception.exit_code == 2
    assert "is a file" in str(result.exception)
    assert blocker.read_text() == "mine"


def test_folder_in_memory(tmp_path: Path) -> None:
    if not MEMORY_FOLDER.is_dir():
        pytest.skip("no folder in memory here")
    folder = MEMORY_FOLDER / f"kvswap-{os.getpid()}"
    result = run("--kv-dir", str(folder))
    assert isinstance(result.exception, StorageError)
    assert "in memory" in str(result.exception)
    assert not folder.exists()


def test_home_of_nobody() -> None:
    result = run("--kv-dir", "~nobody-has-this-name/kv")
    assert isinstance(result.exception, StorageError)


@pytest.mark.parametrize("target", ["missing/report.json", "."])
def test_bad_json_target_is_an_early_error(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvswap.tuning.checkup.check_up", pytest.fail)
    result = run("--kv-dir", str(tmp_path), "--json", str(tmp_path / target))
    assert isinstance(result.exception, ConfigError)
    assert os.listdir(tmp_path) == []


def test_without_io_uring(tmp_path: Path, brief: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_direct_io(tmp_path):
        pytest.skip("no direct I/O here")
    monkeypatch.setattr(Ring, "__init__", refuse_ring)
    result = run("--kv-dir", str(tmp_path))
    assert "io_uring" in result.output
    assert "does not work: EPERM" in result.output
    assert "kvswap will read through threads with direct I/O" in result.output
    assert "seccomp" in result.output.splitlines()[-1]


def test_page_cache_numbers_are_marked(tmp_path: Path, brief: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvswap.disk.choose_backend.probe_direct", refuse_direct)
    monkeypatch.setattr("kvswap.tuning.checkup.probe_direct", refuse_direct)
    report = tmp_path / "report.json"
    result = run("--kv-dir", str(tmp_path), "--json", str(report))
    found = json.loads(report.read_text())
    assert found["read_test"]["page_cache"] is True
    assert (found["folder"]["backend"], found["folder"]["direct_io"]) == ("buffered", False)
    assert "NOT the disk" in result.output
    assert "MB/s at random" not in found["verdict"]["summary"]
    assert "EINVAL (zfs)" in found["verdict"]["advice"][0]


def test_broken_disk_is_a_finding(tmp_path: Path, brief: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **named: object) -> None:
        raise DiskReadError("read of 16384 bytes: EIO")

    monkeypatch.setattr("kvswap.tuning.checkup.measure_reads", fail)
    result = run("--kv-dir", str(tmp_path))
    assert result.exit_code == 0
    assert "not run" in result.output
    assert "EIO" in result.output.splitlines()[-1]


def test_no_room_for_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvswap.tuning.checkup.free_bytes", lambda path: 3 << 20)
    monkeypatch.setattr("kvswap.tuning.checkup.measure_reads", pytest.fail)
    result = run("--kv-dir", str(tmp_path))
    assert "too little free space" in result.output


def test_help_loads_neither_torch_nor_numpy() -> None:
    code = (
        "import sys\nfrom kvswap.cli.doctor import doctor\n"
        "doctor(['--help'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--kv-dir DIR" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
