"""The longest context that a configuration allows, with and without RoPE factors."""

from __future__ import annotations

import pytest

from kvswap.models.adapter import context_limit
from tests.helpers.families import tiny_model

YARN = {"rope_type": "yarn", "rope_theta": 10000.0}
CASES = [
    ({"rope_type": "default", "rope_theta": 10000.0}, 512, 512),
    ({**YARN, "factor": 4.0}, 512, 2048),
    ({**YARN, "factor": 4.0, "original_max_position_embeddings": 512}, 512, 2048),
    ({**YARN, "factor": 4.0, "original_max_position_embeddings": 512}, 2048, 2048),
    ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, 2048, 2048),
    ({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}, 512, 512),
]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(("rope", "positions", "limit"), CASES)
def test_factors_count_where_positions_do_not_contain_them(rope, positions, limit):
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=positions)
    assert context_limit(model) == limit


def test_llama_3_and_layers_with_rope_of_their_own():
    llama = {**LLAMA3, "original_max_position_embeddings": 8192}
    assert context_limit(tiny_model("llama", rope_parameters=llama, max_position_embeddings=131072)) == 131072
    both = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": {**YARN, "factor": 2.0}}
    assert context_limit(tiny_model("gemma3", rope_parameters=both, max_position_embeddings=512)) == 1024
