"""The two hashes of a model keep the values that files hold, and tell models apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from kvswap.models.adapter import inspect
from kvswap.models.identity import attention_fingerprint, weights_hash
from tests.helpers.families import tiny_model


def plain_parts(**changes: Any) -> Any:
    """A model of one matrix and one short vector, for which no library has a say."""
    attention = nn.Module()
    attention.q_proj = nn.Parameter(torch.arange(3000.0).reshape(30, 100))
    attention.norm = nn.Parameter(torch.arange(5.0).half())
    part = SimpleNamespace(attention=attention, layer_type="full_attention")
    config = SimpleNamespace(to_dict=lambda: {"hidden_size": 100, "dtype": "any", "_name_or_path": "any"})
    shape = {"query_heads": 4, "kv_heads": 2, "head_dim": 16, "scaling": 0.25} | changes
    return SimpleNamespace(layers=[part], offloaded=[part], model=attention, config=config, **shape)


def test_hashes_of_stored_files_stay_the_same() -> None:
    assert weights_hash(plain_parts()) == "1e2fff4e6ddd6e88900d6547daa43414"
    assert attention_fingerprint(plain_parts()) == "d1d2aee982701d33151f9986bee1482e3b58b3af506a7a0213df67451dd519a1"


def test_models_are_told_apart() -> None:
    models = [tiny_model("llama"), tiny_model("llama"), tiny_model("llama"), tiny_model("llama", rope_theta=5.0)]
    with torch.no_grad():
        models[1].model.layers[-1].self_attn.k_proj.weight[0, 0] += 1
        models[2].model.layers[0].mlp.up_proj.weight[0, 0] += 1
    parts = [inspect(model) for model in models]
    assert len({weights_hash(each) for each in parts[:3]}) == 3  # K, V of the layers above change with every weight
    fingerprints = [attention_fingerprint(each) for each in parts]
    assert fingerprints[0] == fingerprints[2]
    assert len(set(fingerprints)) == 3
    assert weights_hash(plain_parts()) != weights_hash(plain_parts(scaling=0.5))
