"""A shared beginning of two prompts is computed once, and the results stay the same."""

from __future__ import annotations

import pytest
import torch

from kvswap.config import Config
from kvswap.core.attach import attach_each
from kvswap.lab.evals.prompt_cache import PromptCache
from kvswap.lab.rivals.registry import with_methods
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
