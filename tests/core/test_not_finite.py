"""A number that is infinite or undefined raises where it is chosen by, attended to or stored; nothing of it stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.errors import DamagedError
from kvswap.models.loading import LoadedModel
from kvswap.sessions.check import check
from kvswap.sessions.session import Session
from tests.helpers.families import forced_logits, tiny_model, tokens
from tests.helpers.folders import byte_tokenizer

BAD = [float("nan"), float("inf"), float("-inf")]


class Spoiled:
    """A projection of one layer that gives ``value`` in one element, while it is ``on``, after ``skip`` more calls."""

    def __init__(self, model: Any, layer: int, name: str, value: float) -> None:
        self.on, self.skip, self._value = False, 0, value
        getattr(model.model.layers[layer].self_attn, name).register_forward_hook(self._spoil)

    def _spoil(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if self.on and self.skip:
            self.skip -= 1
        elif self.on:
            output = output.clone()
            output[:, -1, 0] = self._value
        return output


@pytest.fixture(params=["float16", "bfloat16", "float32"])
def config(request: pytest.FixtureRequest, tmp_path: Any) -> Config:
    settings: dict[str, Any] = {"select_tokens": 60, "recent_tokens": 16, "kv_memory": "8MiB"}
    return Config(**settings, kv_dir=str(tmp_path), store_dtype=request.param)


@pytest.mark.parametrize("value", BAD)
def test_no_group_is_chosen_by_a_score_that_is_not_finite(value: float, config: Config) -> None:
    model = tiny_model("llama")
    spoiled = Spoiled(model, 1, "q_proj", value)
    with attach(model, config) as cache:
        forced_logits(model, tokens(1, 300), tokens(1, 3), cache)
        spoiled.on = True
        with pytest.raises(DamagedError, match=r"layer 1: .*no group can be chosen"):
            forced_logits(model, tokens(1, 1), tokens(1, 3), cache)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_nothing_is_appended_to_or_by_what_is_not_finite(name: str, value: float, config: Config) -> None:
    model = tiny_model("llama")
    spoiled = Spoiled(model, 2, name, value)
    with attach(model, config) as cache:
        forced_logits(model, tokens(1, 300), tokens(1, 3), cache)
        spoiled.on = True
        with pytest.raises(DamagedError, match=r"layer 2: .*not finite"):
            forced_logits(model, tokens(1, 60, seed=1), tokens(1, 1), cache)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_a_first_prompt_that_is_not_finite_is_not_stored(name: str, value: float, config: Config) -> None:
    model = tiny_model("llama")
    spoiled = Spoiled(model, 2, name, value)
    with attach(model, config) as cache:
        spoiled.on = True
        with pytest.raises(DamagedError, match=r"layer 2: .*not stored"):
            forced_logits(model, tokens(1, 300), tokens(1, 1), cache)


def test_a_session_is_as_it_was_after_an_answer_that_is_not_finite(tmp_path: Any) -> None:
    model = tiny_model("llama", vocab_size=300)
    loaded, spoiled = LoadedModel(model, byte_tokenizer(), "tiny"), Spoiled(model, 2, "v_proj", float("nan"))
    config = Config(select_tokens=60, recent_tokens=16, kv_memory="8MiB", kv_dir=str(tmp_path))
    with Session.create("s", loaded, config, prompt=tokens(1, 300)[0].tolist()) as session:
        before = session.token_ids
        spoiled.on = True
        with pytest.raises(DamagedError, match=r"layer 2: .*not"):
            list(session.generate(max_new_tokens=80))
        spoiled.on = False
        assert session.token_ids == before
        assert list(session.generate(max_new_tokens=3))
        assert check(session.store).problems == []


@pytest.mark.parametrize("value", BAD)
def test_the_newest_tokens_of_an_answer_are_looked_at_before_they_are_committed(value: float, tmp_path: Any) -> None:
    model = tiny_model("llama", vocab_size=300)
    loaded, spoiled = LoadedModel(model, byte_tokenizer(), "tiny"), Spoiled(model, 2, "v_proj", value)
    config = Config(select_tokens=400, recent_tokens=16, kv_memory="8MiB", kv_dir=str(tmp_path))
    with Session.create("s", loaded, config, prompt=tokens(1, 300)[0].tolist()) as session:
        before = session.token_ids
        spoiled.on, spoiled.skip = True, 1  # the prompt's last token is computed again, and is finite
        with pytest.raises(DamagedError, match=r"layer 2: .*not stored"):
            list(session.generate(max_new_tokens=3))
        assert session.token_ids == before
