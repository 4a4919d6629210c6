"""The check at attach: a family works, or is refused before anything is computed; never a wrong prediction unsaid."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.errors import ModelError
from kvswap.lab.rivals.registry import find
from tests.helpers.families import (
    FAMILIES,
    OTHER_FAMILIES,
    forced_logits,
    full_cache,
    other_model,
    tiny_model,
    tokens,
)


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
