"""Profile files: equal after a round trip, refused when damaged or from another machine or model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from kvswap.errors import ConfigError
from kvswap.tuning import tune
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
        text + text: "damaged JSON",
        text.replace('"made": "now"', '"made": NaN'): "damaged JSON",
        "[" * 100_000: "damaged JSON",
        with_(disks=[{}]): r"missing required field `\w+` - at `\$.disks\[0\]`",
        with_(made=3): r"Expected `str`, got `int` - at `\$.made`",
        with_(extra=3): r"unknown: \$.extra",
        with_(stamp=None): r"Expected `object`, got `null` - at `\$.stamp`",
        with_(stamp={**json.loads(text)["stamp"], "cores": "two"}): r"Expected `int`, got `str` - at `\$.stamp.cores`",
        with_(stamp={**json.loads(text)["stamp"], "cores": 2.5}): r"Expected `int`, got `float` - at `\$.stamp.cores`",
        with_(stamp={**json.loads(text)["stamp"], "cores": True}): r"Expected `int`, got `bool` - at `\$.stamp.cores`",
        with_(stamp={**json.loads(text)["stamp"], "cpus": 1}): r"unknown: \$.stamp.cpus",
        with_(disks=[{**json.loads(text)["disks"][0], "a": 1, "b": 2}]): r"unknown: \$.disks\[0\].a, \$.disks\[0\].b",
    }


def test_damaged_files_are_refused_with_a_message(profile: Profile, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    profile.save(file)
    for text, words in damage(file.read_text()).items():
        file.write_text(text)
        with pytest.raises(ConfigError, match=words) as caught:
            load_profile(file, str(tmp_path), profile.model, force=True)
        assert str(file) in str(caught.value) and "kvswap profile" in caught.value.hint
    with pytest.raises(ConfigError, match="No such file"):
        load_profile(tmp_path / "absent.json", str(tmp_path))


def test_unwritable_target_is_an_error(profile: Profile, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        profile.save(tmp_path / "file" / "profile.json")


def test_profile_that_cannot_be_kept_is_a_notice(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVSWAP_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tune, "take_profile", lambda kv_dir, loaded, on_progress: profile)
    notices: list[str] = []
    found = tune.find_profile(
        None, profile.model, None, str(tmp_path), force=False, on_progress=None, on_notice=notices.append
    )
    assert found is profile
    assert len(notices) == 1 and "the profile cannot be stored" in notices[0]
    monkeypatch.setenv("KVSWAP_HOME", str(tmp_path / "home"))
    for _ in range(2):
        again = tune.find_profile(
            None, profile.model, None, str(tmp_path), force=False, on_progress=None, on_notice=notices.append
        )
        assert again == profile
    assert len(notices) == 1


def test_profile_without_model_costs_is_refused_as_an_object_too(profile: Profile, tmp_path: Path) -> None:
    disk_alone, file = dataclasses.replace(profile, model=None, costs=None), tmp_path / "profile.json"
    disk_alone.save(file)
    for given in (disk_alone, file):
        with pytest.raises(ConfigError, match="no model costs in it; measure the model too"):
            tune.find_profile(
                None, profile.model, given, str(tmp_path), force=True, on_progress=None, on_notice=pytest.fail
            )
