"""attach: what generate can do through it, what it refuses, and that it leaves no trace."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StoppingCriteriaList, TextIteratorStreamer

from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.errors import ConfigError, ModelError, UnsupportedError
from tests.helpers.families import forced_logits, full_cache, given, tiny_model, tokens


def traces(model) -> list[object]:
    layers = model.model.layers
    return [
        model.config._attn_implementation,
        sorted(model.state_dict()),
        ["forward" in layer.__dict__ for layer in layers],
        [sorted(layer.self_attn.__dict__) for layer in layers],
        sorted(model.__dict__),
    ]


def test_model_is_as_it_was_after_leaving(select_all, tmp_path):
    model = tiny_model("llama")
    before = traces(model)
    with attach(model, select_all):
        assert traces(model) != before
    assert traces(model) == before
    with pytest.raises(ZeroDivisionError), attach(model, select_all):
        raise ZeroDivisionError
    assert traces(model) == before
    with pytest.raises(ConfigError), attach(model, Config(kv_memmory=3)):
        pass
    assert traces(model) == before


def test_an_earlier_patch_of_forward_is_put_back(select_all):
    model = tiny_model("llama")
    layer = model.model.layers[0]
    patched = layer.forward
    layer.forward = lambda *args, **kwargs: patched(*args, **kwargs)
    mine = layer.forward
    with attach(model, select_all) as cache:
        forced_logits(model, tokens(1, 50), tokens(1, 3), cache)
    assert layer.forward is mine


def test_nothing_is_left_on_disk(select_all, tmp_path):
    model = tiny_model("llama")
    with attach(model, select_all) as cache:
        forced_logits(model, tokens(1, 600), tokens(1, 3), cache)
        assert [name for _, _, names in os.walk(tmp_path) for name in names] == []
        assert cache.stats.disk_write_bytes > 0


def test_calls_with_another_cache_get_the_models_own_attention(select_all):
    model = tiny_model("gemma3")
    ids, forced = tokens(2, 300), tokens(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :100] = 0
    expected = forced_logits(model, ids, forced, full_cache(model), mask)
    with attach(model, select_all) as cache, torch.no_grad():
        assert torch.equal(forced_logits(model, ids, forced, full_cache(model), mask), expected)
        forced_logits(model, ids, forced, cache, mask)
        assert torch.equal(model(ids).logits, model(ids, **given(model, full_cache(model))).logits)


def test_second_attach_on_one_model_is_refused(select_all):
    model = tiny_model("llama")
    with attach(model, select_all), pytest.raises(ModelError, match="attached already"), attach(model, select_all):
        pass
    with attach(model, select_all):
        pass


@pytest.mark.parametrize(("compiled_step", "tolerance"), [("off", 0.0), ("auto", 1e-5)])
def test_two_models_side_by_side(compiled_step, tolerance, select_all):
    select_all = select_all.replace(compiled_step=compiled_step)
    models = [tiny_model("llama"), tiny_model("qwen2")]
    ids, forced = tokens(1, 400), tokens(1, 5)
    expected = [forced_logits(model, ids, forced, full_cache(model)) for model in models]
    with attach(models[0], select_all) as first, attach(models[1], select_all) as second:
        for model, cache, wanted in zip(models, (first, second), expected, strict=True):
            result = forced_logits(model, ids, forced, cache)
            torch.testing.assert_close(result, wanted, rtol=0, atol=tolerance)


def test_sampling_streaming_and_stopping_stay_those_of_transformers(select_all):
    model, ids = tiny_model("llama"), tokens(1, 300)

    class Words:
        def decode(self, token_ids, **_):
            return "".join(f"{int(token)} " for token in token_ids)

    def stop(input_ids, scores, **_):
        return torch.tensor([input_ids.shape[1] >= 312])

    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 40}
    torch.manual_seed(3)
    expected = model.generate(ids, stopping_criteria=StoppingCriteriaList([stop]), **options)
    with attach(model, select_all) as cache:
        streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=30)

        def run():
            torch.manual_seed(3)
            model.generate(
                ids, streamer=streamer, **given(model, cache), stopping_criteria=StoppingCriteriaList([stop]), **options
            )

        worker = threading.Thread(target=run)
        worker.start()
        text = "".join(streamer)
        worker.join()
    assert text.split() == [str(int(token)) for token in expected[0, 300:]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda model, ids, cache: model.generate(ids, num_beams=2, max_new_tokens=3, **given(model, cache)),
            "beam|repeat",
        ),
        (lambda model, ids, cache: model(ids, **given(model, cache)), "gradients"),
        (
            lambda model, ids, cache: torch.no_grad()(model)(ids, output_attentions=True, **given(model, cache)),
            "output_att",
        ),
        (
            lambda model, ids, cache: torch.no_grad()(model)(
                ids, **given(model, cache), attention_mask=torch.ones(1, 1, 20, 20, dtype=torch.bool)
            ),
            "prepared mask",
        ),
        (
            lambda model, ids, cache: torch.no_grad()(model)(
                ids, **given(model, cache), attention_mask=torch.tensor([[1] * 10 + [0] * 10])
            ),
            "left",
        ),
    ],
)
def test_what_a_cache_on_disk_cannot_serve_is_refused(call, words, select_all):
    model = tiny_model("llama")
    with attach(model, select_all) as cache, pytest.raises(UnsupportedError, match=words):
        call(model, tokens(1, 20), cache)


def test_model_without_full_attention_layers(select_all):
    model = tiny_model("mistral", sliding_window=32)
    with pytest.raises(ModelError, match="no full-attention layer"), attach(model, select_all):
        pass


def test_model_without_the_parts_says_what_is_missing(select_all):
    import transformers

    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ModelError, match="GPT2"), attach(model, select_all):
        pass


def test_hidden_states_are_captured_unharmed(select_all):
    model, ids = tiny_model("llama"), tokens(1, 1200)
    with torch.no_grad():
        expected = model(ids, **given(model, DynamicCache(config=model.config)), output_hidden_states=True)
        with attach(model, select_all) as cache:
            result = model(ids, **given(model, cache), output_hidden_states=True)
    for mine, theirs in zip(result.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(mine, theirs)


def test_callers_embeddings_are_not_written_to(select_all):
    model = tiny_model("llama")
    embeddings = model.get_input_embeddings()(tokens(1, 1200)).detach()
    copy = embeddings.clone()
    with attach(model, select_all) as cache, torch.no_grad():
        model(inputs_embeds=embeddings, **given(model, cache))
    assert torch.equal(embeddings, copy)


def test_every_layer_selects_as_many_tokens_as_it_was_given(tmp_path):
    model = tiny_model("llama")
    config = Config(kv_memory="4MiB", kv_dir=str(tmp_path), select_tokens=100, layer_select_tokens=(80, 400, 160))
    with attach(model, config) as cache:
        forced_logits(model, tokens(1, 600), tokens(1, 5), cache)
        stats, groups = cache.stats, config.layer_select_groups(3)
        assert groups == [3, 83, 23]
        assert stats.selected_groups == 5 * sum(groups)
        assert min(stats.predict_s, stats.slots_s, stats.submit_s) > 0
        parts = (stats.predict_s, stats.slots_s, stats.submit_s, stats.io_wait_s)
        assert sum(parts) < stats.decode_s


def test_layer_budgets_for_another_number_of_layers_are_refused(tmp_path):
    model = tiny_model("llama")
    config = Config(kv_dir=str(tmp_path), layer_select_tokens=(200, 200))
    with attach(model, config) as cache, pytest.raises(ConfigError, match="2 values for 3 offloaded layers"):
        forced_logits(model, tokens(1, 600), tokens(1, 1), cache)


def test_the_memory_plan_is_logged(tmp_path, caplog):
    model = tiny_model("llama")
    with caplog.at_level("DEBUG", logger="kvswap"), attach(model, kv_dir=str(tmp_path), kv_memory="8MiB") as cache:
        forced_logits(model, tokens(1, 300), tokens(1, 1), cache)
    assert any("plan for 1 x 300 tokens under 8.0 MiB: " in each.message for each in caplog.records)
    assert any("kvswap: sketch identity" in each.message for each in caplog.records)


def test_a_cache_may_be_closed_inside_its_block(select_all) -> None:
    model, ids = tiny_model("llama"), tokens(1, 200)
    with attach(model, select_all) as cache:
        forced_logits(model, ids, tokens(1, 2, seed=1), cache)
        cache.close()
        cache.close()
    with attach(model, select_all) as cache:  # one that was never used
        cache.close()
