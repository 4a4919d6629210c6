"""A shared beginning of two prompts is computed once, and the results stay the same."""

from __future__ import annotations

import pytest
import torch

from kvswap.config import Config
from kvswap.core.attach import attach_each
from kvswap.lab.evals.prompt_cache import PromptCache
from kvswap.lab.rivals.registry import with_methods
from kvswap.models.adapter import inspect
from tests.helpers.families import tiny_model, tokens


@pytest.mark.parametrize(("family", "shared"), [("llama", 1024), ("qwen2", 1024), ("gemma3", 0)])
def test_a_common_beginning_is_computed_once(family, shared, tmp_path):
    model, first = tiny_model(family), tokens(1, 1900)[0].tolist()
    second = [*first[:1300], *tokens(1, 500, seed=5)[0].tolist()]
    config, lengths, found = Config(kv_dir=str(tmp_path)), [], []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    for prompts in (PromptCache(), PromptCache()):
        for ids in (first, second) if not found else (second,):
            with attach_each(model, with_methods([("full", config)])) as (full,):
                row = prompts.fill(model, full, ids)
                kv = [(layer.keys, layer.values) for layer in full.layers]
        found.append((row, kv))
    assert lengths == [1900, 1800 - shared, 1800]
    (row, kv), (expected, expected_kv) = found
    torch.testing.assert_close(row, expected, rtol=0, atol=1e-5)
    for pair, expected_pair in zip(kv, expected_kv, strict=True):
        for tensor, other in zip(pair, expected_pair, strict=True):
            torch.testing.assert_close(tensor, other, rtol=0, atol=1e-5)


def test_the_same_prompt_again_computes_its_last_chunk(tmp_path):
    model, ids, lengths = tiny_model("llama"), tokens(1, 1024)[0].tolist(), []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    prompts, rows = PromptCache(), []
    for _ in range(2):
        with attach_each(model, with_methods([("full", Config(kv_dir=str(tmp_path)))])) as (full,):
            rows.append(prompts.fill(model, full, ids))
            assert full.get_seq_length() == 1024
    assert lengths == [1024, 512]
    torch.testing.assert_close(rows[1], rows[0], rtol=0, atol=1e-5)


def fill(prompts, model, ids, tmp_path):
    """Fill a cache; return the prediction, K of the last layer, and the numbers of tokens that were computed."""
    lengths = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    with attach_each(model, with_methods([("full", Config(kv_dir=str(tmp_path / "kv")))])) as (full,):
        row = prompts.fill(model, full, ids)
        keys = full.layers[-1].keys
    hook.remove()
    return row, keys, lengths


def test_questions_about_one_text_share_a_file(tmp_path):
    model, folder, text = tiny_model("llama"), tmp_path / "prompts", tokens(1, 2700)[0].tolist()
    asked = [[*text, *tokens(1, 100, seed=seed)[0].tolist()] for seed in (5, 6)]
    other = [*text[:600], *tokens(1, 2000, seed=7)[0].tolist()]
    computed = [fill(PromptCache(folder), model, ids, tmp_path)[2] for ids in (*asked, asked[0], other)]
    assert computed == [[2800], [2800 - 2560], [], [2600 - 512]]
    assert len(list(folder.iterdir())) == 2  # the second question is near the first; the other text is far from it
    row, keys, _ = fill(PromptCache(folder), model, asked[1], tmp_path)
    expected, expected_keys, _ = fill(PromptCache(), model, asked[1], tmp_path)
    torch.testing.assert_close(row, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(keys, expected_keys, rtol=0, atol=1e-5)


@pytest.mark.parametrize("damage", ["unreadable", "cut"])
def test_a_damaged_file_is_computed_again(damage, tmp_path):
    model, folder, ids = tiny_model("llama"), tmp_path / "prompts", tokens(1, 1400)[0].tolist()
    fill(PromptCache(folder), model, ids, tmp_path)
    (file,) = folder.iterdir()
    content = file.read_bytes()
    prompts = PromptCache(folder)
    if damage == "cut":  # while it is known
        assert prompts.stored_tokens(inspect(model), 512, ids) == 1400
    file.write_bytes(b"damaged" if damage == "unreadable" else content[:-100])
    assert fill(prompts, model, ids, tmp_path)[2] == [1400]
    assert file.read_bytes() == content


def test_a_sliding_window_shares_no_file_but_the_same_prompt_does(tmp_path):
    model, folder, text = tiny_model("gemma3"), tmp_path / "prompts", tokens(1, 1400)[0].tolist()
    for ids, computed in ((text, [1400]), ([*text[:-1], 3], [1400]), (text, [])):
        assert fill(PromptCache(folder), model, ids, tmp_path)[2] == computed
    assert len(list(folder.iterdir())) == 2


def test_the_last_prompt_again_is_neither_computed_nor_copied(tmp_path):
    model, ids, prompts = tiny_model("llama"), tokens(1, 700)[0].tolist(), PromptCache()
    _, keys, _ = fill(prompts, model, ids, tmp_path)
    with attach_each(model, with_methods([("full", Config(kv_dir=str(tmp_path / "kv")))])) as (full,):
        prompts.fill_again(full)
        assert full.get_seq_length() == 700 and full.layers[-1].keys.data_ptr() == keys.data_ptr()
