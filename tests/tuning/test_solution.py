"""Tuned configurations: their files, and the choice of a solution."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvswap.errors import ConfigError
from kvswap.tuning.solution import Prediction, Solution, TunedConfig, is_tuned, load_tuned


def solution(batch: int, tokens: int, **values: Any) -> Solution:
    prediction = Prediction(
        tokens_per_s=8.0,
        compute_s=0.07,
        predict_s=0.02,
        slots_s=0.01,
        submit_s=0.01,
        wait_s=0.0,
        reads=100.0,
        read_bytes=1e6,
        reuse_rate=0.5,
        expected_kl=0.01,
        kl_bound=0.02,
        memory_parts={"sketch": 1000},
    )
    values = {"group_tokens": 4, "layer_select_tokens": [200, 400], **values}
    return Solution(batch=batch, context_tokens=tokens, values=values, prediction=prediction, reasons=["because"])


@pytest.fixture
def tuned() -> TunedConfig:
    solutions = [solution(1, 32768), solution(1, 4096, group_tokens=8), solution(4, 8192)]
    return TunedConfig(model="tiny", fingerprint="abc", made="now", disk="ext4", prefer="quality", solutions=solutions)


def test_round_trip(tuned: TunedConfig, tmp_path: Path) -> None:
    tuned.save(tmp_path / "tuned.json")
    assert load_tuned(tmp_path / "tuned.json") == tuned
    assert is_tuned(tmp_path / "tuned.json")
    assert tuned.config(context_tokens=100).layer_select_tokens == (200, 400)


@pytest.mark.parametrize(
    ("batch", "tokens", "expected"),
    [(1, 100, 4096), (1, 4096, 4096), (1, 4097, 32768), (1, 90000, 32768), (3, 8000, 8192), (9, 9000, 8192)],
)
def test_the_smallest_large_enough_solution_is_used(tuned: TunedConfig, batch: int, tokens: int, expected: int) -> None:
    assert tuned.nearest(batch=batch, context_tokens=tokens).context_tokens == expected


def test_files_keep_the_keys_of_their_version(tuned: TunedConfig, tmp_path: Path) -> None:
    """Files of version 2 call the prediction ``promise`` and its bound ``promised_kl``."""
    tuned.save(tmp_path / "tuned.json")
    for each, saved in zip(
        json.loads((tmp_path / "tuned.json").read_text())["solutions"], tuned.solutions, strict=True
    ):
        assert set(each) == {"batch", "context_tokens", "values", "promise", "reasons"}
        assert each["promise"]["promised_kl"] == saved.prediction.kl_bound
        assert each["promise"]["memory_parts"] == saved.prediction.memory_parts


def test_another_model_is_refused(tuned: TunedConfig) -> None:
    tuned.check_model("abc")
    with pytest.raises(ConfigError, match="another model, tiny"):
        tuned.check_model("xyz")


def test_damaged_files_are_refused(tuned: TunedConfig, tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    tuned.save(file)
    whole = json.loads(file.read_text())
    bad_value = {**whole["solutions"][0], "values": {"group_tokens": 4000}}
    bad_key = {**whole["solutions"][0], "values": {"group_token": 4}}
    stopped = {**whole["solutions"][0], "promise": {**whole["solutions"][0]["promise"], "tokens_per_s": 0}}
    for changes, words in (
        ({"solutions": []}, "no solution"),
        ({"solutions": [bad_value]}, "group_tokens"),
        ({"solutions": [bad_key]}, "unknown config key"),
        ({"solutions": [stopped]}, "tokens_per_s"),
        ({"version": 1}, "version 1, this kvswap reads 2.*run `kvswap tune` again"),
        ({"made": None}, "made"),
    ):
        file.write_text(json.dumps({**whole, **changes}))
        with pytest.raises(ConfigError, match=words):
            load_tuned(file)
    assert not is_tuned(tmp_path / "absent")
    file.write_text("{")
    assert not is_tuned(file)
