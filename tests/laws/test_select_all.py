"""Law 1: selecting everything equals full attention. The reference is transformers' stock sdpa forward.

Where a token goes through the modules of the model, the results are equal bit for bit. Compiled steps add in another
order, and agree to 1e-5.
"""

from __future__ import annotations

import gguf
import pytest
import torch

from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.core.compiled_step import CompiledDecode
from kvswap.models.loading import load_model
from kvswap.native import step_loops
from kvswap.native.library import available
from tests.helpers.families import (
    FAMILIES,
    OTHER_FAMILIES,
    forced_logits,
    full_cache,
    given,
    other_model,
    tiny_model,
    tokens,
)
from tests.helpers.folders import save_tiny
from tests.helpers.packed import packable_model, write_model

STEPS = 70  # more than the recent window, so that groups leave it and come back from disk


def assert_equal(result, reference, cache, *, exact=True):
    """Equal bit for bit, or to 1e-5 where steps are compiled or the order of sums is another one anyway."""
    compiled = isinstance(cache.decode, CompiledDecode)
    assert compiled == (cache.config.compiled_step == "auto" and step_loops.available())
    if exact and not compiled:
        assert torch.equal(result, reference)
    else:
        torch.testing.assert_close(result, reference, rtol=0, atol=1e-5)


@pytest.fixture(params=["off", "auto"])
def select_all(select_all, request):
    """Everything is selected, with steps through modules and with compiled steps."""
    return select_all.replace(compiled_step=request.param)


@pytest.mark.parametrize("prompt_tokens", [1, 5, 300, 1030, 1537])
@pytest.mark.parametrize("family", FAMILIES)
def test_select_all_equals_full_attention(family, prompt_tokens, select_all):
    model = tiny_model(family)
    ids, forced = tokens(1, prompt_tokens), tokens(1, STEPS, seed=1)
    reference = forced_logits(model, ids, forced, full_cache(model))
    with attach(model, select_all) as cache:
        result = forced_logits(model, ids, forced, cache)
        assert cache.stats.disk_read_bytes > 0 or prompt_tokens < 5
        # its sliding layers see chunks of another length than in one piece, which changes the order of sums
        assert_equal(result, reference, cache, exact=family != "gemma3" or prompt_tokens <= 512)


@pytest.mark.skipif(not available(), reason="nothing was compiled here")
@pytest.mark.parametrize("prompt_tokens", [1, 5, 1030, 1537])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_weights_as_well(family, prompt_tokens, select_all, tmp_path):
    """The reference are the same packed layers; 1,537 tokens leave a chunk of a single one."""
    file = write_model(tmp_path / "tiny.gguf", packable_model(family), gguf.GGMLQuantizationType.Q8_0)
    model = load_model(str(file)).model
    ids, forced = tokens(1, prompt_tokens), tokens(1, STEPS, seed=1)
    reference = forced_logits(model, ids, forced, full_cache(model))
    with attach(model, select_all) as cache:
        result = forced_logits(model, ids, forced, cache)
    off = (result - reference).abs().amax(-1).flatten()
    if select_all.compiled_step == "auto":
        # Another order of sums may round an input to the next of its 255 levels. K, V of that token stay different, so
        # what counts is how often steps that agree are followed by one that does not.
        agrees = off < 1e-4
        assert off.max() < 5e-3 and int(agrees.sum()) >= len(off) // 4
        assert int((agrees[:-1] & ~agrees[1:]).sum()) <= len(off) // 5
    elif family == "gemma3" and prompt_tokens > 512:
        # the same, from sliding layers
        assert off.max() < 1e-3 and int((off > 1e-5).sum()) <= 3
    else:
        assert torch.equal(result, reference)


@pytest.mark.skipif(not available(), reason="nothing was compiled here")
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_packed_checkpoints_as_well(family, select_all, tmp_path, monkeypatch):
    """Matrices of 4 bits in the layers, of 8 in the output."""
    monkeypatch.setenv("KVSWAP_HOME", str(tmp_path / "home"))
    model = load_model(str(save_tiny(tmp_path / "m", family)), weights="q4").model
    ids, forced = tokens(1, 300), tokens(1, STEPS, seed=1)
    reference = forced_logits(model, ids, forced, full_cache(model))
    with attach(model, select_all) as cache:
        result = forced_logits(model, ids, forced, cache)
        assert isinstance(cache.decode, CompiledDecode) == (select_all.compiled_step == "auto")
        assert cache.stats.disk_read_bytes > 0
    off = (result - reference).abs().amax(-1).flatten()
    if select_all.compiled_step == "auto":  # rounded inputs, as above
        assert off.max() < 1e-2 and off.median() < 1e-4
    else:
        assert torch.equal(result, reference)


@pytest.mark.parametrize("lengths", [(1030, 700, 90), (40, 7, 301), (64, 64), (1, 9, 30)])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch_equals_each_sequence_alone(family, lengths, select_all):
    model = tiny_model(family)
    width = max(lengths)
    ids, forced = tokens(len(lengths), width), tokens(len(lengths), STEPS, seed=1)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    alone = [
        forced_logits(model, ids[b : b + 1, width - n :], forced[b : b + 1], full_cache(model))
        for b, n in enumerate(lengths)
    ]
    with attach(model, select_all) as cache:
        result = forced_logits(model, ids * mask, forced, cache, mask)
    torch.testing.assert_close(result, torch.cat(alone, dim=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_padded_batch_with_eager_attention(family, select_all):
    model = tiny_model(family, attn_implementation="eager")
    lengths = (331, 298)
    ids, forced = tokens(2, 331), tokens(2, STEPS, seed=1)
    mask = torch.tensor([[0] * (331 - n) + [1] * n for n in lengths])
    alone = [
        forced_logits(model, ids[b : b + 1, 331 - n :], forced[b : b + 1], full_cache(model))
        for b, n in enumerate(lengths)
    ]
    with attach(model, select_all) as cache:
        assert cache.implementation == "eager"
        result = forced_logits(model, ids * mask, forced, cache, mask)
    torch.testing.assert_close(result, torch.cat(alone, dim=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("group_tokens", [1, 3, 8])
@pytest.mark.parametrize("recent_tokens", [0, 5, 64])
def test_any_geometry(group_tokens, recent_tokens, select_all):
    model = tiny_model("llama")
    ids, forced = tokens(1, 333), tokens(1, STEPS, seed=1)
    reference = forced_logits(model, ids, forced, full_cache(model))
    config = select_all.replace(group_tokens=group_tokens, recent_tokens=recent_tokens, sink_tokens=recent_tokens // 2)
    with attach(model, config) as cache:
        assert_equal(forced_logits(model, ids, forced, cache), reference, cache)


TAKEN = [*FAMILIES, *(name for name, (_, _, refusal) in OTHER_FAMILIES.items() if not refusal)]


@pytest.mark.parametrize("family", TAKEN)
def test_second_turn_is_exact_against_the_stored_context(family, select_all):
    model = tiny_model(family) if family in FAMILIES else other_model(family)
    turns = [tokens(1, 1100), tokens(1, 600, seed=2), tokens(1, 3, seed=3)]
    forced = tokens(1, 9, seed=1)
    reference = full_cache(model)
    expected = [forced_logits(model, turn, forced, reference) for turn in turns]
    with attach(model, select_all) as cache:
        for turn, wanted in zip(turns, expected, strict=True):
            torch.testing.assert_close(forced_logits(model, turn, forced, cache), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_over_two_turns(family, select_all):
    model = tiny_model(family)
    ids, more = tokens(1, 700), tokens(1, 40, seed=5)
    first = model.generate(ids, max_new_tokens=20, do_sample=False)
    second = model.generate(torch.cat((first, more), dim=1), max_new_tokens=20, do_sample=False)
    with attach(model, select_all) as cache:
        got = model.generate(ids, max_new_tokens=20, do_sample=False, **given(model, cache))
        assert torch.equal(got, first)
        computed = cache.get_seq_length()
        got = model.generate(torch.cat((got, more), dim=1), max_new_tokens=20, do_sample=False, **given(model, cache))
        assert torch.equal(got, second)
        assert cache.get_seq_length() == computed + 1 + 40 + 19


@pytest.mark.usefixtures("groups_are_read")
@pytest.mark.parametrize("compiled_step", ["off", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_shorter_than_the_selection_attends_to_everything(family, compiled_step, tmp_path):
    model = tiny_model(family)
    ids, forced = tokens(1, 200), tokens(1, 50, seed=1)
    reference = forced_logits(model, ids, forced, full_cache(model))
    settings = {"store_dtype": "float32", "kv_memory": "16MiB", "kv_dir": str(tmp_path)}
    with attach(model, Config(compiled_step=compiled_step, **settings)) as cache:
        assert_equal(forced_logits(model, ids, forced, cache), reference, cache)
