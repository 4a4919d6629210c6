"""Sliding windows as ring buffers, against transformers' own layer, and compiled steps of models that have them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvswap.core.attach import attach
from kvswap.core.window_layer import LARGEST_GROUP_TOKENS, WindowLayer, WindowStep
from kvswap.native import step_loops
from tests.core.test_compiled_run import at_once, steps
from tests.core.test_compiled_step import config
from tests.helpers.families import Letters, forced_logits, full_cache, tiny_model, tokens

compiled = pytest.mark.skipif(not step_loops.available(), reason="no compiled loops: there was no C compiler")

PADDING = np.array([0, 3, 40])


def kv(count: int, seed: int = 0) -> list[torch.Tensor]:
    """K, V of ``count`` tokens of three sequences."""
    return list(torch.randn(2, 3, 2, count, 4, generator=torch.Generator().manual_seed(seed)).unbind())


def put_newest(layer: WindowLayer, step: WindowStep, keys: torch.Tensor, values: torch.Tensor) -> None:
    """What compiled code does with the K, V ``[B, H_kv, 1, d]`` of a step."""
    layer.slots(step, PADDING)
    data = layer._buffer.data.flatten(0, 1)
    for b, (slot, offset) in enumerate(zip(step.newest, step.offset, strict=True)):
        data[slot, :, :, offset] = torch.stack((keys[b, :, 0], values[b, :, 0]))
    layer.advance()


def attended(layer: WindowLayer, step: WindowStep, b: int) -> torch.Tensor:
    """Keys ``[n, H_kv, d]`` that compiled code attends to, in any order."""
    data, found = layer._buffer.data.flatten(0, 1), []
    valid = np.ones_like(step.index[b], bool) if step.valid is None else step.valid[b]
    real = step.index[b][valid]
    for slot in real:
        count = step.last[b] + 1 if slot == real[-1] else step.group_tokens
        found.append(data[slot, 0].transpose(0, 1)[:count])
    return torch.cat(found)


@pytest.mark.parametrize("window", [1, 2, 7, 48, 64, 127, 600, 1024])
@pytest.mark.parametrize("prompt", [41, 130, 700])
def test_a_ring_buffer_attends_to_what_transformers_attends_to(window, prompt):
    ours, theirs = WindowLayer(sliding_window=window), DynamicSlidingWindowLayer(sliding_window=window)
    for layer in (ours, theirs):
        layer.update(*kv(prompt))
    for number in range(70):
        step, (keys, values) = WindowStep(window, prompt + number - PADDING), kv(1, seed=1 + number)
        put_newest(ours, step, keys, values)
        all_keys, _ = theirs.update(keys, values)
        for b, padding in enumerate(PADDING):
            own = all_keys[b, :, -min(window, prompt + number + 1 - padding) :].transpose(0, 1)
            assert torch.equal(_sorted(attended(ours, step, b)), _sorted(own))
        assert step.group_tokens <= LARGEST_GROUP_TOKENS and window % step.group_tokens == 0
    assert ours.get_seq_length() == theirs.get_seq_length() and ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
    shown = torch.arange(prompt + 70)[None] >= torch.from_numpy(PADDING)[:, None]
    shown = shown[:, max(0, prompt + 70 - window + 1) :][:, None, :, None]
    for name in ("keys", "values"):
        found, expected = getattr(ours, name), getattr(theirs, name)
        if window > 1:  # or transformers keeps everything
            assert torch.equal(found, expected * shown)


def _sorted(keys: torch.Tensor) -> torch.Tensor:
    return keys[keys[:, 0, 0].argsort()]


def test_a_copy_of_a_ring_buffer_keeps_what_it_has():
    layer, window = WindowLayer(sliding_window=64), 64
    layer.update(*kv(100))
    put_newest(layer, WindowStep(window, 100 - PADDING), *kv(1, seed=1))
    other = copy.copy(layer)
    before = copy.copy(other).keys.clone()
    put_newest(layer, WindowStep(window, 101 - PADDING), *kv(1, seed=2))
    assert other._buffer is not None and other.get_seq_length() == 101 and torch.equal(other.keys, before)
    assert layer.get_seq_length() == 102 and not torch.equal(layer.keys, before)


def test_size_is_told_without_ending_a_ring_buffer():
    layer = WindowLayer(sliding_window=64)
    assert layer.size_bytes == 0
    layer.update(*kv(100))
    assert layer.size_bytes == 2 * 3 * 2 * 63 * 4 * 4
    layer.slots(WindowStep(64, 100 - PADDING), PADDING)
    assert layer.size_bytes == 2 * 3 * 2 * 64 * 4 * 4 and layer._buffer is not None


@compiled
@pytest.mark.parametrize("window", [16, 37, 64, 600, 5000])
@pytest.mark.parametrize("lengths", [(300,), (3, 64, 300)])
def test_steps_of_layers_with_windows_give_what_modules_give(window, lengths, tmp_path, cache_home):
    model, width = tiny_model("gemma3", sliding_window=window), max(lengths)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    found = []
    for way in ("off", "auto"):
        with attach(model, config(tmp_path, compiled_step=way, store_dtype="float32"), tokenizer=Letters()) as cache:
            ids = tokens(len(lengths), width) * mask
            found.append(forced_logits(model, ids, tokens(len(lengths), 80, seed=1), cache, mask))
            assert at_once(cache) == (way == "auto")
    torch.testing.assert_close(*found, rtol=0, atol=2e-5)


@compiled
def test_everything_selected_equals_full_attention(tmp_path, cache_home):
    model = tiny_model("gemma3", sliding_window=48)
    ids, forced = tokens(2, 300), tokens(2, 60, seed=1)
    expected = forced_logits(model, ids, forced, full_cache(model))
    settings = config(tmp_path, select_tokens=4096, store_dtype="float32")
    logits, _, whole, _ = steps(model, settings, ids=ids, forced=forced)
    assert whole
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


@compiled
def test_a_hook_and_a_second_prompt_find_the_window_as_it_is(tmp_path, cache_home):
    model = tiny_model("gemma3")
    found, ids = [], (tokens(1, 200), tokens(1, 100, seed=2), tokens(1, 1, seed=3))
    for way in ("off", "auto"):
        with attach(
            model, config(tmp_path, compiled_step=way, store_dtype="float32", select_tokens=4096), tokenizer=Letters()
        ) as cache:
            logits = [forced_logits(model, each, tokens(1, 20, seed=1), cache) for each in ids[:2]]
            assert at_once(cache) == (way == "auto")
            hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
            logits.append(forced_logits(model, ids[2], tokens(1, 20, seed=4), cache))
            hook.remove()
            assert way == "off" or not at_once(cache)
            found.append(torch.cat(logits))
    torch.testing.assert_close(*found, rtol=0, atol=2e-5)


@compiled
def test_windows_that_are_compiled_beside_a_layer_that_is_not(tmp_path, cache_home):
    """Then steps go layer by layer."""
    model = tiny_model("gemma3")
    mlp = model.model.layers[1].mlp
    kind = type(mlp)
    mlp.__class__ = type("Other", (kind,), {"forward": lambda self, x: 1.1 * kind.forward(self, x)})
    plain, expected, _, _ = steps(model, config(tmp_path, compiled_step="off"))
    logits, chosen, whole, _ = steps(model, config(tmp_path))
    assert not whole and all(map(np.array_equal, chosen, expected))
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-5)


@compiled
def test_a_model_that_gives_a_type_of_layers_another_rope_goes_layer_by_layer(tmp_path, cache_home):
    model = tiny_model("gemma3", layer_types=["full_attention", "sliding_attention"] * 2)
    kind = type(model.model.layers[0])

    def other(self, hidden, **kwargs):
        cos, sin = kwargs.pop("position_embeddings")
        return kind.__call__(self, hidden, position_embeddings=(sin, cos), **kwargs)

    for index in (1, 3):  # those with a window
        model.model.layers[index].__class__ = type("Other", (kind,), {"__call__": other})
    plain, _, _, _ = steps(model, config(tmp_path, compiled_step="off"))
    logits, _, whole, _ = steps(model, config(tmp_path))
    assert not whole
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-5)
