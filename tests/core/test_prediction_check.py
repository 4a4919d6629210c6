"""The check at attach: a family works, or is refused before anything is computed; never a wrong prediction unsaid."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.errors import ModelError
from kvswap.lab.rivals.registry import find
from kvswap.models.loading import load_model
from kvswap.native.library import available
from tests.helpers.families import (
    FAMILIES,
    OTHER_FAMILIES,
    forced_logits,
    full_cache,
    other_model,
    tiny_model,
    tokens,
)
from tests.helpers.packed import write_model


def attached_logits(model: Any, config: Config, ids: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
    with attach(model, config) as cache:
        return forced_logits(model, ids, forced, cache)


@pytest.mark.parametrize("name", [name for name, (_, _, reason) in OTHER_FAMILIES.items() if not reason])
def test_a_family_on_no_list_works(name: str, select_all: Config) -> None:
    model, ids, forced = other_model(name), tokens(1, 700), tokens(1, 4, seed=1)
    expected = forced_logits(model, ids, forced, full_cache(model))
    assert torch.allclose(attached_logits(model, select_all, ids, forced), expected, atol=1e-5)
    selected = attached_logits(model, select_all.replace(select_tokens=100), ids, forced)  # queries are predicted
    assert selected.isfinite().all()


@pytest.mark.parametrize("name", [name for name, (_, _, reason) in OTHER_FAMILIES.items() if reason])
def test_a_family_that_would_be_wrong_is_refused_at_attach(name: str, select_all: Config) -> None:
    model = other_model(name)
    calls: list[int] = []
    for part, module in model.named_modules():
        if part.endswith(("o_proj", "mlp")):
            module.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ModelError, match=OTHER_FAMILIES[name][2]), attach(model, select_all):
        pass
    assert len(calls) <= 2  # of the first layer, where it hides its attention
    assert not any("forward" in layer.__dict__ for layer in model.get_decoder().layers)
    assert model.config._attn_implementation in ("sdpa", "eager")


def no_rope(layer: Any) -> None:
    forward = layer.self_attn.forward

    def without(hidden_states: torch.Tensor, position_embeddings: Any, **kwargs: Any) -> Any:
        cos, sin = position_embeddings
        return forward(hidden_states, position_embeddings=(torch.ones_like(cos), torch.zeros_like(sin)), **kwargs)

    layer.self_attn.forward = without


def half_rope(layer: Any) -> None:
    forward = layer.self_attn.forward

    def half(hidden_states: torch.Tensor, position_embeddings: Any, **kwargs: Any) -> Any:
        cos, sin = (each.clone() for each in position_embeddings)
        cos[..., ::2], sin[..., ::2] = 1, 0
        return forward(hidden_states, position_embeddings=(cos, sin), **kwargs)

    layer.self_attn.forward = half


def scaled_input(layer: Any) -> None:
    layer.self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "hidden_states": kwargs["hidden_states"].tanh()}), with_kwargs=True
    )


def other_values(layer: Any) -> None:
    layer.self_attn.v_proj = nn.Linear(64, 2 * 8)


@pytest.mark.parametrize("edit", [no_rope, half_rope, scaled_input, other_values])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_one_layer_that_differs_is_found(edit: Callable[[Any], None], index: int, select_all: Config) -> None:
    model = tiny_model("llama")
    edit(model.model.layers[index])
    with pytest.raises(ModelError, match=f"layer {index} "), attach(model, select_all):
        pass


def test_another_norm_and_projection_pass(select_all: Config) -> None:
    model, ids, forced = tiny_model("llama"), tokens(1, 300), tokens(1, 3)
    layer = model.model.layers[1]
    layer.input_layernorm = nn.LayerNorm(64)
    layer.self_attn.q_proj.register_forward_hook(lambda _, args, output: output * args[0].mean().sigmoid())
    expected = forced_logits(model, ids, forced, full_cache(model))
    assert torch.allclose(attached_logits(model, select_all, ids, forced), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_16_bits_pass(family: str, dtype: torch.dtype, select_all: Config) -> None:
    with attach(tiny_model(family).to(dtype), select_all):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_leaves_no_trace_and_takes_milliseconds(family: str, select_all: Config) -> None:
    from kvswap.core.model_patch import Attachment
    from kvswap.core.prediction_check import check_prediction

    model = tiny_model(family).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    attributes = [set(vars(module)) for module in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    attachment = Attachment(model)
    times_s = []
    for _ in range(3):
        start_s = time.perf_counter()
        check_prediction(attachment.parts, attachment.implementation)
        times_s.append(time.perf_counter() - start_s)
    attachment.restore()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in model.named_buffers())
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert not any(parameter.grad_fn for parameter in model.parameters())
    assert min(times_s) < 0.05


def test_methods_that_keep_everything_in_memory_need_no_prediction(select_all: Config) -> None:
    with attach(other_model("smollm3 (no rope in layer 3)"), select_all, method=find("full")):
        pass


def change_forward(model: Any) -> None:
    scaled_input(model.model.layers[1])


def change_scaling(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "hook": change_forward,
    "patched forward": lambda model: no_rope(model.model.layers[1]),
    "attribute": change_scaling,
    "module": lambda model: setattr(model.model.layers[2].self_attn, "q_proj", nn.Linear(64, 64)),
    "weight in place": lambda model: nn.init.zeros_(model.model.layers[2].self_attn.q_proj.weight),
    "weight": lambda model: setattr(model.model.layers[2].input_layernorm, "weight", nn.Parameter(torch.ones(64))),
    "loaded": lambda model: model.load_state_dict({name: each.clone() for name, each in model.state_dict().items()}),
    "dtype": lambda model: model.to(torch.bfloat16),
    "training": lambda model: model.train(),
    "config": lambda model: setattr(model.config, "attention_bias", True),
    "attention": lambda model: model.set_attn_implementation("eager"),
}


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every check that runs."""
    from kvswap.core import prediction_check

    found: list[int] = []
    original = prediction_check.check_prediction
    monkeypatch.setattr(prediction_check, "check_prediction", lambda *given: (found.append(1), original(*given)))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_stays_as_it_is_is_checked_once(family: str, select_all: Config, checks: list[int]) -> None:
    model = tiny_model(family)
    for _ in range(3):
        with attach(model, select_all) as cache:
            forced_logits(model, tokens(1, 20), tokens(1, 2), cache)
        model.generate(tokens(1, 20), max_new_tokens=2)
    assert len(checks) == 1
    with attach(tiny_model(family), select_all):
        assert len(checks) == 2


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_changed_is_checked_anew(name: str, select_all: Config, checks: list[int]) -> None:
    model = tiny_model("llama")
    with attach(model, select_all):
        pass
    CHANGES[name](model)
    for _ in range(2):  # a refusal is not forgotten either
        refused = name in ("hook", "patched forward", "attribute")
        with (
            pytest.raises(ModelError, match=r"layer 1|differ") if refused else nullcontext(),
            attach(model, select_all),
        ):
            pass
    assert len(checks) == (2 if not refused else 3 if name != "attribute" else 1)


def test_models_are_not_kept_alive_by_the_check(select_all: Config) -> None:
    model = tiny_model("llama")
    with attach(model, select_all):
        pass
    gone = weakref.ref(model.model)
    del model
    gc.collect()
    assert gone() is None


def language_model_of(kind: str) -> Any:
    """A tiny random model for pictures and text; without pictures it is the language model in it."""
    config = transformers.AutoConfig.for_model(kind)
    text, vision = config.get_text_config(), config.vision_config
    size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    size |= {"vocab_size": 128, "num_hidden_layers": 2, "head_dim": 16, "pad_token_id": 0}
    for owner, values in (
        (text, {**size, "layer_types": ["full_attention"] * 2}),
        (vision, {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}),
    ):
        for name, value in values.items():
            if hasattr(owner, name):
                setattr(owner, name, value)
    torch.manual_seed(7)
    return transformers.AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize("kind", ["llava", "gemma3", "mistral3", "idefics3"])
def test_a_language_model_within_another_works(kind: str, select_all: Config) -> None:
    model, ids, forced = language_model_of(kind), tokens(1, 300), tokens(1, 3)
    expected = forced_logits(model, ids, forced, full_cache(model))
    assert torch.allclose(attached_logits(model, select_all, ids, forced), expected, atol=1e-5)


def test_a_wrapper_that_looks_into_its_masks_is_refused_at_attach(select_all: Config) -> None:
    model = language_model_of("paligemma")
    with pytest.raises(ModelError, match=r"cannot run under kvswap: .*Mask"), attach(model, select_all):
        pass
    assert "forward" not in model.get_decoder().layers[0].__dict__


@pytest.mark.skipif(not available(), reason="nothing was compiled here")
def test_a_model_that_is_mapped_from_a_file_is_checked_once(
    tmp_path: Path, select_all: Config, checks: list[int]
) -> None:
    loaded = load_model(str(write_model(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=300))))
    for _ in range(2):
        with attach(loaded.model, select_all):
            pass
    assert len(checks) == 1
