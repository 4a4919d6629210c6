from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvswap.config import BACKENDS, COMPILED_STEPS, STORE_DTYPES, Config
from kvswap.errors import ConfigError


@st.composite
def valid_values(draw: st.DrawFn) -> dict[str, Any]:
    """Values of a Config that is allowed, some of its keys left out."""
    values: dict[str, Any] = {
        "kv_memory": draw(st.sampled_from(["auto", "24MiB", 1 << 20])),
        "kv_dir": draw(st.none() | st.text()),
        "group_tokens": draw(st.integers(1, 64)),
        "sketch_token_bytes": draw(st.none() | st.integers(1, 512)),
        "sketch_rank": draw(st.none() | st.integers(1, 512)),
        "sketch_bits": draw(st.sampled_from([2, 4, 8])),
        "sink_tokens": draw(st.integers(0, 100)),
        "recent_tokens": draw(st.integers(0, 300)),
        "store_dtype": draw(st.sampled_from(STORE_DTYPES)),
        "backend": draw(st.sampled_from(BACKENDS)),
        "compiled_step": draw(st.sampled_from(COMPILED_STEPS)),
        "chunk_tokens": 512 * draw(st.integers(1, 8)),
        "read_depth": draw(st.integers(1, 1024)),
        "read_gap_bytes": draw(st.integers(0, 1 << 24)),
        "select_tokens": 1000 + draw(st.integers(0, 5000)),
        "layer_select_tokens": draw(st.none() | st.lists(st.integers(1000, 5000), min_size=1).map(tuple)),
    }
    left_out = draw(st.sets(st.sampled_from(sorted(set(values) - {"select_tokens"}))))
    return {key: value for key, value in values.items() if key not in left_out}


@given(valid_values())
def test_repr_and_dict_rebuild(values: dict[str, Any]) -> None:
    config = Config(**values)
    assert {key: getattr(config, key) for key in values} == values
    assert eval(repr(config), {"Config": Config}) == config
    assert Config(**json.loads(json.dumps(config.to_dict()))) == config


@given(valid_values())
def test_selection_and_pinned_groups_fit_the_budget(values: dict[str, Any]) -> None:
    config = Config(**values)
    group = config.group_tokens
    assert config.sink_groups * group >= config.sink_tokens > (config.sink_groups - 1) * group
    assert config.recent_groups >= 1
    assert config.recent_groups * group >= config.recent_tokens
    most = max(config.layer_select_tokens or (config.select_tokens,))
    spare = most - config.pinned_tokens - config.select_groups * group
    assert config.select_groups >= 1
    assert 0 <= spare < group


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("select_token", "select_tokens"),
        ("groups_tokens", "group_tokens"),
        ("kvdir", "kv_dir"),
        ("dtype", "store_dtype"),
    ],
)
def test_unknown_key_gets_the_nearest_name(key: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown config key '{key}'; did you mean '{near}'"):
        Config(**{key: 1})


def test_unknown_key_like_none_gets_all_names() -> None:
    with pytest.raises(ConfigError) as caught:
        Config(qqq=1)
    assert all(key in str(caught.value) for key in Config().to_dict())


def test_only_keywords() -> None:
    with pytest.raises(TypeError):
        Config("24MiB")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("select_tokens", 0),
        ("select_tokens", 400.0),
        ("select_tokens", "400"),
        ("group_tokens", True),
        ("group_tokens", 0),
        ("group_tokens", 65),
        ("sink_tokens", -1),
        ("recent_tokens", -1),
        ("read_depth", 0),
        ("read_depth", 1025),
        ("read_gap_bytes", -1),
        ("read_gap_bytes", (1 << 24) + 1),
        ("read_gap_bytes", "16KiB"),
        ("chunk_tokens", 256),
        ("chunk_tokens", 768),
        ("sketch_token_bytes", 0),
        ("sketch_rank", 0),
        ("sketch_rank", "auto"),
        ("sketch_bits", 3),
        ("sketch_bits", 4.0),
        ("store_dtype", "float64"),
        ("store_dtype", ["auto"]),
        ("backend", "mmap"),
        ("kv_memory", "lots"),
        ("kv_memory", 0),
        ("kv_dir", 5),
    ],
)
def test_out_of_range_is_refused_with_key_and_value(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        Config(**{key: value})
    assert str(value) in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("key", "value"),
    [("group_tokens", 64), ("read_depth", 1024), ("read_gap_bytes", 0), ("sink_tokens", 0), ("recent_tokens", 0)],
)
def test_ends_of_the_ranges_are_allowed(key: str, value: int) -> None:
    assert getattr(Config(**{key: value}), key) == value


def test_selection_must_leave_a_group_beside_the_pinned() -> None:
    least = Config().pinned_tokens + Config().group_tokens
    assert Config(select_tokens=least).select_groups == 1
    with pytest.raises(ConfigError, match=f"use at least {least}"):
        Config(select_tokens=least - 1)


def test_frozen_hashable_and_copied() -> None:
    config = Config(select_tokens=500)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.select_tokens = 5  # type: ignore[misc]
    assert len({config, Config(select_tokens=500), Config()}) == 2
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_replace_changes_a_copy_and_checks_it() -> None:
    config = Config()
    changed = config.replace(group_tokens=8, select_tokens=800)
    assert (changed.group_tokens, changed.select_tokens, changed.sink_tokens) == (8, 800, config.sink_tokens)
    assert config == Config()
    with pytest.raises(ConfigError, match="did you mean"):
        config.replace(group_token=8)
    with pytest.raises(ConfigError, match="group_tokens"):
        config.replace(group_tokens=0)


def test_from_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config = Config(kv_memory="24MiB", kv_dir="/data/kv", group_tokens=8)
    path.write_text(json.dumps(config.to_dict()))
    assert Config.from_file(path) == Config.from_file(str(path)) == config
    path.write_text('{"group_tokens": 8}')
    assert Config.from_file(path) == Config(group_tokens=8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "config.json"),
        (b"{", "config.json"),
        (b"\xff\xfe{}", "config.json"),
        (b"[1]", "not a JSON object"),
        (b'"auto"', "not a JSON object"),
        (b'{"groups": 4}', "did you mean"),
        (b'{"group_tokens": 0}', "group_tokens"),
    ],
)
def test_bad_file(text: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=words):
        Config.from_file(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigError, match="config file"):
            Config.from_file(path)


@pytest.mark.parametrize("value", [[], [400, 20], [400, 3.5], 400, "400"])
def test_layer_budgets_that_cannot_be_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="layer_select_tokens"):
        Config(layer_select_tokens=value)


def test_file_below_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_text('{"group_tokens": 8}')
    assert Config.from_file("~/config.json").group_tokens == 8
    for path in ("~no-such-user-of-ours/config.json", "a\0b", "\ud800"):
        with pytest.raises(ConfigError, match="config file"):
            Config.from_file(path)


def test_file_that_is_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="config file"):
        Config.from_file(tmp_path / "config.json")
