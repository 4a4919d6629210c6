"""Models that come wrapped, patched, compiled or spread; callers that leave early or call again: works, or says why."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.errors import ModelError, UnsupportedError
from tests.helpers.families import forced_logits, full_cache, given, tiny_model, tokens


class Wrapper(nn.Module):
    """Takes anything and hands it on, as PEFT's models do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


def patched(model: Any) -> Any:
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    return model


def patched_decoder(model: Any) -> Any:
    patched(model.model)
    return model


@pytest.mark.parametrize("wrap", [Wrapper, patched, patched_decoder, lambda model: Wrapper(patched(model))])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_wrapped_and_patched_models_work(wrap: Any, family: str, select_all: Config) -> None:
    ids, forced = tokens(1, 600), tokens(1, 5)
    plain = tiny_model(family)
    expected = forced_logits(plain, ids, forced, full_cache(plain))
    model = wrap(tiny_model(family))
    with attach(model, select_all) as cache:
        assert torch.allclose(forced_logits(model, ids, forced, cache), expected, atol=1e-5)
        with pytest.raises(ModelError, match="attached already"), attach(getattr(model, "base_model", model)):
            pass


def test_compiled_models_are_refused_at_attach(select_all: Config) -> None:
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="compiled"), attach(torch.compile(model, backend="eager"), select_all):
        pass
    model.model.layers[1].compile(backend="eager")
    with pytest.raises(ModelError, match="compiled"), attach(model, select_all):
        pass


def test_weights_that_are_not_in_memory_are_refused_at_attach(select_all: Config) -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.to("meta")
    with pytest.raises(ModelError, match="not in memory but offloaded"), attach(model, select_all):
        pass
    assert "forward" not in model.model.layers[0].__dict__


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_inference_mode_and_no_grad_take_turns(family: str, select_all: Config) -> None:
    model, ids, forced = tiny_model(family), tokens(1, 600), tokens(1, 12)
    expected = forced_logits(model, ids, forced, full_cache(model))
    modes = (torch.inference_mode, torch.no_grad)
    for first, second in (modes, modes[::-1]):
        with first(), attach(model, select_all) as cache:
            found = [model(ids, **given(model, cache)).logits[:, -1]]
            for index, column in enumerate(forced.unbind(1)):
                with torch.inference_mode(False), (second, first)[index % 2]():
                    found.append(model(column[:, None], **given(model, cache)).logits[:, -1])
        assert torch.allclose(torch.stack(found), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("again", [700, 650, 1, 300])
def test_a_prompt_given_again_is_refused_and_harms_nothing(family: str, again: int, select_all: Config) -> None:
    model, ids = tiny_model(family), tokens(1, 700)
    with attach(model, select_all) as cache:
        longer = model.generate(ids, max_new_tokens=5, do_sample=False, **given(model, cache))
        with pytest.raises(UnsupportedError, match="tokens are stored"):
            model.generate(ids[:, :again], max_new_tokens=5, do_sample=False, **given(model, cache))
        assert cache.get_seq_length() == 704
        more = model.generate(longer, max_new_tokens=5, do_sample=False, **given(model, cache))
    plain = model.generate(ids, max_new_tokens=10, do_sample=False)
    assert torch.equal(more, plain)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("steps", [0, 1, 3, 10])
def test_leaving_the_block_while_generate_runs(family: str, steps: int, select_all: Config) -> None:
    model, ids = tiny_model(family), tokens(1, 700)
    expected = forced_logits(model, ids, tokens(1, 3), full_cache(model))
    at_step, errors, scored = threading.Event(), [], []

    def count(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scored.append(1)
        if len(scored) > steps:
            at_step.set()
        return scores

    def run(cache: Any) -> None:
        try:
            model.generate(ids, max_new_tokens=5000, logits_processor=[count], **given(model, cache))
        except Exception as error:  # noqa: BLE001 - looked at below
            errors.append(error)
        finally:
            at_step.set()

    with attach(model, select_all) as cache:
        worker = threading.Thread(target=run, args=(cache,))
        worker.start()
        if steps:
            assert at_step.wait(60)
    worker.join(60)
    assert not worker.is_alive()
    assert [type(error) for error in errors] == [UnsupportedError], errors
    assert "has been left" in str(errors[0])
    assert torch.equal(forced_logits(model, ids, tokens(1, 3), full_cache(model)), expected)


def test_a_cache_is_of_no_use_after_its_block(select_all: Config) -> None:
    model, ids = tiny_model("llama"), tokens(1, 300)
    with attach(model, select_all) as cache:
        forced_logits(model, ids, tokens(1, 3), cache)
    for call in (ids, ids[:, :1]):
        with pytest.raises(UnsupportedError, match="has been left"), torch.no_grad():
            model(call, **given(model, cache))
    with attach(model, select_all), pytest.raises(UnsupportedError, match="has been left"), torch.no_grad():
        model(ids, **given(model, cache))


@pytest.mark.parametrize("where", ["argument", "generation_config", "config"])
def test_generate_without_a_cache_is_refused_before_its_prompt(where: str, select_all: Config) -> None:
    model, ids, arguments = tiny_model("llama"), tokens(1, 300), {}
    if where == "argument":
        arguments["use_cache"] = False
    elif where == "generation_config":
        model.generation_config.use_cache = False
    else:
        model.config.use_cache = False
    with attach(model, select_all) as cache, pytest.raises(UnsupportedError, match="use_cache=False"), torch.no_grad():
        if where == "config":
            model(ids, **given(model, cache))
        model.generate(ids, max_new_tokens=3, do_sample=False, **arguments, **given(model, cache))
    assert cache.stats.disk_write_bytes == 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("stored", [0, 300])
def test_leaving_the_block_between_the_mask_and_the_first_layer(family: str, stored: int, select_all: Config) -> None:
    """The model's own layers are back then, and the mask is still kvswap's."""
    model, errors = tiny_model(family), list[Exception]()
    arrived, left = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:  # RoPE is computed after masks and before layers
        arrived.set()
        assert left.wait(60)

    def run(cache: Any) -> None:
        try:
            with torch.no_grad():
                model(tokens(1, 40), **given(model, cache))
        except Exception as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    with attach(model, select_all) as cache:
        if stored:
            forced_logits(model, tokens(1, stored), tokens(1, 0), cache)
        hook = model.model.rotary_emb.register_forward_hook(wait)
        worker = threading.Thread(target=run, args=(cache,))
        worker.start()
        assert arrived.wait(60)
    left.set()
    worker.join(60)
    hook.remove()
    assert [type(error) for error in errors] == [UnsupportedError], errors
    assert "has been left" in str(errors[0])
