"""Where the calibration cannot be stored, it is measured for this run, and a notice says so."""

from __future__ import annotations

import errno
import os
import pwd
from pathlib import Path

import pytest

from kvswap.config import Config
from kvswap.core import calibration
from kvswap.core.attach import attach
from kvswap.disk import atomic
from tests.helpers.families import tiny_model
from tests.helpers.folders import byte_tokenizer


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "CALIBRATION_TOKENS", 512)


def sketch_and_notices(kv_dir: Path) -> tuple[str, list[str]]:
    notices: list[str] = []
    model, tokenizer = tiny_model("llama", vocab_size=259), byte_tokenizer()
    with attach(model, Config(kv_dir=str(kv_dir)), tokenizer=tokenizer, on_notice=notices.append) as cache:
        return cache.stats.sketch, notices


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The sketch of a run that can keep its calibration, in a folder that is found again."""
    monkeypatch.setenv("KVSWAP_HOME", str(tmp_path / "home"))
    sketch, notices = sketch_and_notices(tmp_path / "kv")
    assert notices == []
    assert len(os.listdir(tmp_path / "home" / "calibration")) == 1
    monkeypatch.setattr(calibration, "CalibrationCache", None)  # nothing is measured again
    assert sketch_and_notices(tmp_path / "kv") == (sketch, [])
    monkeypatch.undo()
    return sketch


def home_is_a_file(patch: pytest.MonkeyPatch, folder: Path) -> str:
    (folder / "file").touch()
    patch.setenv("KVSWAP_HOME", str(folder / "file"))
    return "Not a directory; set KVSWAP_HOME"


def home_is_read_only(patch: pytest.MonkeyPatch, folder: Path) -> str:
    def refuse(path: Path) -> Path:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    patch.setenv("KVSWAP_HOME", str(folder / "read-only"))
    patch.setattr(atomic, "temporary_path", refuse)
    return "Read-only file system; set KVSWAP_HOME"


def home_is_absent(patch: pytest.MonkeyPatch, folder: Path) -> str:
    def unknown(uid: int) -> object:
        raise KeyError(uid)

    for name in ("KVSWAP_HOME", "XDG_CACHE_HOME", "HOME"):
        patch.delenv(name, raising=False)
    patch.setattr(pwd, "getpwuid", unknown)
    return "no home folder"


def disk_is_full(patch: pytest.MonkeyPatch, folder: Path) -> str:
    def refuse(*args: object, **options: object) -> None:
        raise calibration.SafetensorError("I/O error: No space left on device")

    patch.setenv("KVSWAP_HOME", str(folder / "full"))
    patch.setattr(calibration, "save_statistics", refuse)
    return "No space left on device; set KVSWAP_HOME"


@pytest.mark.parametrize("trouble", [home_is_a_file, home_is_read_only, home_is_absent, disk_is_full])
def test_calibration_that_cannot_be_kept_is_a_notice(
    trouble, kept: str, short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(calibration, "CALIBRATION_TOKENS", 512)
    words = trouble(monkeypatch, tmp_path)
    with caplog.at_level("DEBUG", logger="kvswap"):
        sketch, notices = sketch_and_notices(tmp_path / "kv")
    assert sketch == kept
    assert len(notices) == 1
    assert notices[0].startswith("the calibration cannot be stored") and words in notices[0]
    assert "calibration is not kept" in caplog.text
