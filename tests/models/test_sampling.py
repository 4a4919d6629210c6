"""What ``Sampling`` accepts, torch can sample with; the rest is refused by name before a model is loaded."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from kvswap.errors import ConfigError
from kvswap.models.sampling import MOST_TOKENS, SEEDS, TEMPERATURES, Sampling

LOGITS = torch.tensor([[-1e4, -3.0, 0.0, 0.5, 9.0, 1e4, -math.inf]])
EDGES = [*SEEDS, SEEDS[0] - 1, SEEDS[1] + 1, 1 << 63, -1, 0, 10**40, True]
NUMBERS = [0, 0.0, -0.0, 5e-324, 1e-40, *TEMPERATURES, 1e38, 1e39, 1e308, math.inf, -math.inf, math.nan, 10**400, True]


@given(
    st.sampled_from(EDGES) | st.integers(),
    st.sampled_from(NUMBERS) | st.floats(),
    st.sampled_from([*NUMBERS, 1.0, 1 - 1e-16]) | st.floats(0, 1),
    st.sampled_from([0, 1, MOST_TOKENS, MOST_TOKENS + 1, 10**40, True]) | st.integers(),
)
def test_what_is_accepted_can_be_sampled_with(seed: int, temperature: float, top_p: float, new_tokens: int) -> None:
    try:
        sampling = Sampling(seed=seed, temperature=temperature, top_p=top_p, max_new_tokens=new_tokens)
    except ConfigError as error:
        assert error.hint
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        arguments = sampling.arguments()
        scores = LOGITS
        if arguments["do_sample"]:
            scores = TemperatureLogitsWarper(float(arguments["temperature"]))(None, scores)
            scores = TopPLogitsWarper(float(arguments["top_p"]))(None, scores) if top_p < 1 else scores
        chances = scores.softmax(-1)
        assert bool(chances.isfinite().all())
        assert 0 <= int(torch.multinomial(chances, 1)) < LOGITS.shape[1]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("seed", [SEEDS[0] - 1, SEEDS[1] + 1, 1.5, True]),
        ("temperature", [-1, 1e-40, 1e39, math.inf, math.nan, "1"]),
        ("top_p", [0, -1, 1.01, math.nan, None]),
        ("max_new_tokens", [0, -1, MOST_TOKENS + 1, 2.0]),
    ],
)
def test_the_rest_is_refused_by_name(name: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(ConfigError) as caught:
            Sampling(**{name: value})
        assert str(caught.value).startswith(f"{name}: got {value}; use ")
