"""Disk quota, eviction, write limit and free-space reserve, through the command."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from kvswap.cli.main import run_command
from kvswap.sessions import quota
from kvswap.sessions.catalog import open_store, used_bytes

pytestmark = pytest.mark.usefixtures("cache_home")


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "kv" / "sessions"


@pytest.fixture
def ask(tiny, tmp_path, capfd):
    def call(session: str, *words: object) -> tuple[int, str]:
        base = [
            "run",
            "--model",
            tiny,
            "--ask",
            f"{session}: " + "Who? " * 60,
            "--max-new-tokens",
            4,
            "--kv-dir",
            tmp_path / "kv",
        ]
        code = run_command([str(word) for word in [*base, "--session", session, *words]])
        return code, capfd.readouterr().err

    return call


def age(root: Path, name: str, seconds: int) -> None:
    """Make a session look used some time ago, as its manifest would say."""
    from dataclasses import replace

    with open_store(str(root.parent), name) as store:
        manifest = replace(store.manifest, used=store.manifest.used - seconds)
        from kvswap.sessions.manifest_json import encode

        store.folder.replace("manifest", encode(manifest, store.sealer.sign))


def test_closed_sessions_make_room_least_recently_used_first(ask, root) -> None:
    for name in ("a", "b", "c"):
        assert ask(name)[0] == 0
    age(root, "b", 500)
    age(root, "a", 100)
    limit = used_bytes(root) + 3 * (512 << 10)  # the new one needs a third of that as it grows
    code, err = ask("d", "--disk-quota", limit)
    assert code == 0 and "removed" not in err
    taken = used_bytes(root)
    code, err = ask("e", "--disk-quota", taken + 1000)
    gone = [line.split()[4] for line in err.splitlines() if line.endswith("was removed")]
    assert code == 0 and gone == ["b", "a", "c", "d"][: len(gone)] and gone
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == sorted({*"abcde"} - {*gone})
    assert used_bytes(root) <= taken + 1000


def test_open_sessions_stay_and_too_small_a_quota_removes_nothing(ask, root) -> None:
    assert ask("a")[0] == ask("b")[0] == 0
    with open_store(str(root.parent), "a"):
        code, err = ask("c", "--disk-quota", used_bytes(root) // 2)
    assert code == 2 and "raise --disk-quota or remove sessions" in err
    assert (root / "a").exists() and (root / "b").exists() and not (root / "c").exists()


def test_write_limit_of_a_day(ask, root, monkeypatch) -> None:
    assert ask("a")[0] == 0
    written = json.loads((root / ".usage").read_text())
    assert written["day_bytes"] == written["total_bytes"] > 100_000
    code, err = ask("b", "--write-limit", written["day_bytes"] + 1000)
    assert code == 2 and "write limit" in err and "go on tomorrow" in err
    monkeypatch.setattr(quota, "_today", lambda: "2099-01-01")
    assert ask("b", "--write-limit", 2 * written["day_bytes"] + 4_000_000)[0] == 0
    after = json.loads((root / ".usage").read_text())
    assert after["day"] == "2099-01-01" and after["day_bytes"] < after["total_bytes"]
    (root / ".usage").write_text("[]")
    assert quota.read_written_bytes(root).total_bytes == 0


def test_some_space_is_left_for_others(ask, monkeypatch) -> None:
    kind = namedtuple("kind", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: kind(1 << 40, 0, quota.RESERVE_BYTES + 1000))
    code, err = ask("a")
    assert code == 2 and "are left for others" in err


def test_summary_tells_what_was_written(ask) -> None:
    assert "written for it so far" in ask("a")[1]
