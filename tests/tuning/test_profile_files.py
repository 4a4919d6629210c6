"""Profile files: equal after a round trip, refused when damaged or from another machine or model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from kvswap.errors import ConfigError
from kvswap.tuning.cost import ModelFacts
from kvswap.tuning.profile import Profile, load_profile, stamp_of
from tests.tuning.test_cost import disk, model


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    facts = ModelFacts(
        name="tiny",
        fingerprint="abc",
        layers=3,
        query_heads=4,
        kv_heads=2,
        head_dim=16,
        compute_itemsize_bytes=4,
        store_itemsize_bytes=2,
        longest_tokens=8192,
        threads=2,
    )
    return Profile(stamp=stamp_of(tmp_path), made="now", disks=[disk()], model=facts, costs=model())


def test_round_trip(profile: Profile, tmp_path: Path) -> None:
    file = tmp_path / "new" / "profile.json"
    profile.save(file)
    assert load_profile(file, str(tmp_path), profile.model) == profile
    assert [path.name for path in file.parent.iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cpu": "Abacus"}, "cpu Abacus instead of"),
        ({"kernel": "Linux 2.4"}, "kernel Linux 2.4"),
        ({"disk": "ext4 1"}, "disk ext4 1"),
        ({"packages": {"torch": "1.0"}}, "torch 1.0 instead of"),
    ],
)
def test_profile_of_another_machine_is_refused_unless_forced(
    changes: dict[str, Any], words: str, profile: Profile, tmp_path: Path
) -> None:
    other = dataclasses.replace(profile, stamp=dataclasses.replace(profile.stamp, **changes))
    other.save(tmp_path / "profile.json")
    with pytest.raises(ConfigError, match=words) as caught:
        load_profile(tmp_path / "profile.json", str(tmp_path), profile.model)
    assert "--force" in str(caught.value)
    assert load_profile(tmp_path / "profile.json", str(tmp_path), profile.model, force=True) == other


def test_profile_of_another_model_is_refused(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "profile.json")
    assert profile.model is not None
    for changes, words in (({"fingerprint": "xyz"}, "model tiny"), ({"threads": 9}, "2 threads instead of 9")):
        facts = dataclasses.replace(profile.model, **changes)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=words):
            load_profile(tmp_path / "profile.json", str(tmp_path), facts)


def damage(text: str) -> dict[str, str]:
    """Damaged file contents, each with a part of the expected message."""

    def with_(**changes: Any) -> str:
        return json.dumps({**json.loads(text), **changes})

    return {
        text[: len(text) // 2]: "damaged JSON",
        "[]": "not a kvswap-profile file",
        with_(format="other"): "not a kvswap-profile file",
        with_(version=99): "version 99, this kvswap reads 2",
        with_(disks=[]): "no read was measured",
        with_(disks=[{}]): "lacks or has too much",
        with_(made=3): "made",
        with_(extra=3): "extra",
        with_(stamp=None): "Stamp is no object",
        with_(stamp={**json.loads(text)["stamp"], "cores": "two"}): "cores",
    }


def test_damaged_files_are_refused_with_a_message(profile: Profile, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    profile.save(file)
    for text, words in damage(file.read_text()).items():
        file.write_text(text)
        with pytest.raises(ConfigError, match=words) as caught:
            load_profile(file, str(tmp_path), profile.model, force=True)
        assert str(file) in str(caught.value) and caught.value.hint
    with pytest.raises(ConfigError, match="No such file"):
        load_profile(tmp_path / "absent.json", str(tmp_path))


def test_unwritable_target_is_an_error(profile: Profile, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        profile.save(tmp_path / "file" / "profile.json")
