"""A hub id that cannot be fetched is told at once, with the reason; no test here reaches a network."""

from __future__ import annotations

import pytest
from huggingface_hub import HfApi, constants

from kvswap.errors import ModelError
from kvswap.models.hub import has_cached, problem_with
from kvswap.models.loading import load_model


def test_offline_mode_is_named_and_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def reach(*args: object, **options: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", reach)
    problem = problem_with("org/model")
    assert problem is not None and not problem.final
    assert "HF_HUB_OFFLINE" in problem.text and "HF_HUB_OFFLINE" in problem.hint
    with pytest.raises(ModelError, match=r"model no-such-org/no-such-model: .*HF_HUB_OFFLINE"):
        load_model("no-such-org/no-such-model")


def test_dead_network_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: HfApi, *args: object, **options: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "model_info", fail)
    problem = problem_with("org/model")
    assert problem is not None and "cannot be reached" in problem.text


def test_bad_id_is_final() -> None:
    problem = problem_with("a--b/c..d")
    assert problem is not None and problem.final


def test_nothing_is_cached_of_an_unknown_model() -> None:
    assert not has_cached("no-such-org/no-such-model")
