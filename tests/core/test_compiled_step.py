"""Compiled steps against the same steps through the modules of the model, which are the specification."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.core.cache import KVSwapCache
from kvswap.core.compiled_step import CompiledDecode
from kvswap.errors import DamagedError
from kvswap.native import step_loops
from tests.helpers.families import FAMILIES, OTHER_FAMILIES, Letters, forced_logits, other_model, tiny_model, tokens

pytestmark = pytest.mark.skipif(not step_loops.available(), reason="no compiled loops: there was no C compiler")

COMPILED = (*FAMILIES, "cwm", "gemma", "granite", "ministral", "seed-oss", "smollm3 (all rope)")
"""Families whose layers are built as compiled calls expect."""


def model_of(family):
    return tiny_model(family) if family in FAMILIES else other_model(family)


def config(tmp_path, **settings) -> Config:
    small = {"select_tokens": 128, "kv_memory": "32MiB", "kv_dir": str(tmp_path), "store_dtype": "float16"}
    return Config(**{**small, **settings})


def compiled_layers(cache: KVSwapCache) -> int:
    return len(cache.decode._layers) if isinstance(cache.decode, CompiledDecode) else 0


def both_ways(model, config, ids, forced, mask=None):
    """Logits through modules and compiled, and how many layers were compiled."""
    found = []
    for way in ("off", "auto"):
        with attach(model, config.replace(compiled_step=way)) as cache:
            found.append(forced_logits(model, ids, forced, cache, mask))
            layers, selected = compiled_layers(cache), cache.stats.selected_groups
        assert (layers > 0) <= (way == "auto")
        assert selected > 0 or ids.shape[1] <= 64
    return *found, layers


@pytest.mark.parametrize("family", [*FAMILIES, *(name for name, found in OTHER_FAMILIES.items() if not found[2])])
def test_both_ways_agree_in_every_family(family, tmp_path):
    model = model_of(family)
    plain, compiled, layers = both_ways(model, config(tmp_path), tokens(1, 700), tokens(1, 12, seed=1))
    assert (layers > 0) == (family in COMPILED)
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)
    assert torch.equal(compiled.argmax(-1), plain.argmax(-1))


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("batch", [1, 2])
def test_calibrated_sketches_choose_the_same_both_ways(family, batch, tmp_path, cache_home):
    model, found = tiny_model(family), []
    for way in ("off", "auto"):
        with attach(model, config(tmp_path, compiled_step=way), tokenizer=Letters()) as cache:
            logits = forced_logits(model, tokens(batch, 700), tokens(batch, 6, seed=1), cache)
            found.append((logits, [cache.decode.chosen(order)[0] for order in range(len(cache.parts.offloaded))]))
            assert cache.stats.sketch.startswith("transform")
    (plain, expected), (compiled, chosen) = found
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)
    assert all(map(np.array_equal, chosen, expected))


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
@pytest.mark.parametrize("batch", [3, 9])
def test_both_ways_agree_in_padded_batches(family, batch, tmp_path):
    model, width = tiny_model(family), 420
    lengths = [width - 37 * n for n in range(batch)]
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    ids = tokens(batch, width) * mask
    plain, compiled, layers = both_ways(model, config(tmp_path), ids, tokens(batch, 6, seed=1), mask)
    assert layers > 0
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [(1,), (1, 2), (1, 9, 30), (3, 64), (3, 300), (1, 40, 500)])
def test_both_ways_agree_in_contexts_shorter_than_sinks_and_window(lengths, tmp_path, cache_home):
    """Where the newest group is a sink, or the window is not full; in a batch each sequence in its own way.

    A sequence may be too short to have groups to choose from, beside one that has.
    """
    model, width = tiny_model("llama"), max(lengths)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    ids = tokens(len(lengths), width) * mask
    settings = config(tmp_path, store_dtype="float32")  # or a number is rounded the other way in some of the steps
    found, forced = [], tokens(len(lengths), 40, seed=1)
    for way in ("off", "auto"):
        with attach(model, settings.replace(compiled_step=way), tokenizer=Letters()) as cache:
            found.append(forced_logits(model, ids, forced, cache, mask))
    plain, compiled = found
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("store_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group_tokens", [1, 3, 8, 64])
def test_both_ways_agree_in_any_geometry(store_dtype, group_tokens, tmp_path):
    settings = config(tmp_path, store_dtype=store_dtype, group_tokens=group_tokens, select_tokens=256)
    plain, compiled, _ = both_ways(tiny_model("llama"), settings, tokens(1, 500), tokens(1, 8, seed=1))
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)


def test_both_ways_agree_in_bfloat16(tmp_path):
    model = tiny_model("qwen3").to(torch.bfloat16)
    settings = config(tmp_path, select_tokens=2000)  # all of it: rounding decides between groups that are nearly equal
    plain, compiled, layers = both_ways(model, settings, tokens(1, 500), tokens(1, 8, seed=1))
    assert layers == 3
    torch.testing.assert_close(compiled.float(), plain.float(), rtol=0, atol=0.05)


def test_a_hook_or_another_module_takes_the_path_of_modules(tmp_path):
    model, seen = tiny_model("llama"), []
    ids, forced = tokens(1, 500), tokens(1, 3, seed=1)
    with attach(model, config(tmp_path)) as cache:
        forced_logits(model, ids, forced, cache)
        assert compiled_layers(cache) == 3
        with torch.no_grad():
            hook = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: seen.append(1))
            forced_logits(model, tokens(1, 1), forced, cache)
            hook.remove()
        assert len(seen) == 4 and compiled_layers(cache) == 0


def test_a_layer_that_computes_something_else_is_not_compiled(tmp_path):
    model = tiny_model("llama")
    model.model.layers[1].mlp.act_fn = nn.ReLU()
    sums = type(model.model.layers[2].mlp).forward
    model.model.layers[2].mlp.__class__ = type(
        "Other", (type(model.model.layers[2].mlp),), {"forward": lambda self, x: 1.1 * sums(self, x)}
    )
    with attach(model, config(tmp_path)) as cache:
        forced_logits(model, tokens(1, 500), tokens(1, 1), cache)
        assert list(cache.decode._layers) == [0]


def test_values_that_are_no_numbers_are_an_error(tmp_path):
    model = tiny_model("llama")
    with attach(model, config(tmp_path)) as cache:
        forced_logits(model, tokens(1, 500), tokens(1, 1), cache)
        model.model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))
        with pytest.raises(DamagedError, match="not finite"):
            forced_logits(model, tokens(1, 1), tokens(1, 1), cache)
