"""Whatever generation_config.json says: temperature 0 takes the likeliest token, and what else counts is named."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import GenerationConfig

from kvswap.app.documents import Document
from kvswap.app.engine import Engine, load
from kvswap.errors import ModelError
from kvswap.models.generation_config import KEYS, Use, remarks
from kvswap.models.loading import load_model
from tests.helpers.folders import save_tiny

DOCUMENT = Document("story.txt", "A story that goes on and on. " * 8)
AWKWARD = {
    "use_cache": False,
    "max_length": 7,
    "min_length": 400,
    "min_new_tokens": 400,
    "early_stopping": True,
    "max_time": 1e-9,
    "num_beams": 3,
    "num_return_sequences": 2,
    "cache_implementation": "static",
    "min_p": 0.9,
    "typical_p": 0.2,
    "epsilon_cutoff": 0.9,
    "eta_cutoff": 0.9,
    "repetition_penalty": 9.0,
    "encoder_repetition_penalty": 9.0,
    "length_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "exponential_decay_length_penalty": [0, 50.0],
    "token_healing": True,
    "guidance_scale": 3.0,
    "watermarking_config": {"bias": 9.0},
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "max_cache_len": 3,
    "num_assistant_tokens": 3,
    "disable_compile": True,
    "top_k": 1,
    "top_p": 0.1,
    "temperature": 9.0,
    "do_sample": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _own_cache(cache_home) -> None:
    """Calibrations stay out of the user's folder."""


def answer(engine: Engine, question: str = "Who?") -> list[int]:
    list(engine.ask(question, [DOCUMENT], max_new_tokens=6))
    return engine.stats.token_ids


def test_every_key_of_transformers_is_decided():
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert known - set(KEYS) <= {"transformers_version"}
    assert {key for key in AWKWARD if key not in KEYS} == set()


def test_no_key_ends_in_an_error_or_changes_temperature_0_unsaid(folder, select_all):
    loaded = load_model(str(folder))
    with load(loaded, select_all) as engine:
        expected = answer(engine)
        for key, value in AWKWARD.items():
            loaded.model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
            setattr(loaded.model.generation_config, key, value)
            engine.new_conversation()
            assert answer(engine) == expected, key
            assert engine.stats.finish_reason == "length", key
            named = [text for text in remarks(loaded.model.generation_config) if key in text]
            assert bool(named) == (KEYS[key] is Use.SET_ASIDE), key


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_checkpoints_without_a_cache_use_ours(tmp_path, select_all, file):
    """Each step computes one token, whatever the file says about caches."""
    folder = save_tiny(tmp_path / "m")
    loaded = load_model(str(folder))
    with load(loaded, select_all) as engine:
        expected = answer(engine)
    settings = json.loads((folder / file).read_text()) | {"use_cache": False}
    (folder / file).write_text(json.dumps(settings))
    loaded = load_model(str(folder))
    with load(loaded, select_all) as engine:
        assert answer(engine) == expected
        prompt = engine.stats.prompt_tokens
        answer(engine, "And?")
        assert engine.stats.stored_tokens == prompt + 5


def test_engine_says_what_counts_and_what_does_not(tmp_path, select_all):
    folder = save_tiny(tmp_path / "m")
    settings = {"repetition_penalty": 1.1, "num_beams": 4, "suppress_tokens": [9], "num_wishes": 3, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    notices: list[str] = []
    with load(load_model(str(folder)), select_all, on_notice=notices.append) as engine:
        assert len(notices) == 2 and engine.stats.notices == []
        answer(engine)
        assert engine.stats.notices == notices
    aside, changing = notices
    assert "num_beams, num_wishes, repetition_penalty" in aside and "temperature" not in aside
    assert "suppress_tokens" in changing


def test_bias_of_a_checkpoint_counts_but_is_not_measured_as_a_loss(folder, select_all, monkeypatch):
    """Quality compares selected with exact attention: both before anything that the checkpoint adds."""
    loaded = load_model(str(folder))
    monkeypatch.setattr(loaded.model.generation_config, "sequence_bias", [[[7], 100.0]])
    with load(loaded, select_all, check_quality=True) as engine:
        assert answer(engine) == [7] * 6
        assert engine.stats.quality.kl < 1e-4


def test_stop_string_ends_an_answer(folder, select_all, monkeypatch):
    loaded = load_model(str(folder))
    monkeypatch.setattr(loaded.model.generation_config, "sequence_bias", [[loaded.tokenizer("a")["input_ids"], 1000.0]])
    monkeypatch.setattr(loaded.model.generation_config, "stop_strings", ["aaa"])
    with load(loaded, select_all) as engine:
        assert "".join(engine.ask("Who?", max_new_tokens=40)) == "aaa"
        assert engine.stats.finish_reason == "stop"


@pytest.mark.parametrize("key", AWKWARD)
def test_every_key_loads_from_a_file_or_is_refused_by_name(folder, tmp_path, key):
    copied = tmp_path / "m"
    shutil.copytree(folder, copied)
    (copied / "generation_config.json").write_text(json.dumps({key: AWKWARD[key]}))
    try:
        config = load_model(str(copied)).model.generation_config
    except ModelError as error:
        assert "generation_config.json: " in str(error) and key in str(error)
    else:
        assert getattr(config, key) is not None


def test_malformed_file_is_an_error_of_ours(tmp_path):
    folder = save_tiny(tmp_path / "m")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json is not JSON"):
        load_model(str(folder))
