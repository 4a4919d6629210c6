"""What an evaluation is expected to take: arithmetic of the estimate, and rates of a tiny model."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest

from kvswap.config import Config
from kvswap.lab.evals.estimate import Rates, estimate, measure_rates
from kvswap.lab.evals.prompt_cache import shared_tokens
from kvswap.lab.evals.samples import Sample
from kvswap.lab.evals.variants import FULL, Variant
from tests.helpers.families import tiny_model, tokens

RATES = Rates(token_s=1.0, token_behind_s=0.01, step_s=2.0, step_behind_s=0.1, token_bytes=8, element_bytes=4)
KNOWN = partial(shared_tokens, chunk_tokens=10)


def sample(prompt: range, **values: object) -> Sample:
    return Sample(context=200, index=0, prompt=tuple(prompt), forced=(1,) * 5, **values)


def test_attention_makes_long_prompts_dearer_and_a_shared_beginning_saves_its_share():
    assert RATES.prompt_s(0, 100) == 100 + 50
    assert RATES.prompt_s(0, 100) + RATES.prompt_s(100, 200) == RATES.prompt_s(0, 200) == 400
    assert RATES.steps_s(5, 100, 1) == 5 * (2 + 10)
    assert RATES.steps_s(5, 100, 3) == pytest.approx(5 * (2 * 1.6 + 10))


def test_samples_add_up():
    first, second = sample(range(100)), sample(range(95), answers=("x",), max_new_tokens=20)
    variants = [FULL, Variant("kvswap", "1MiB"), Variant("mmap", "1MiB")]
    found = estimate(RATES, [(first, variants), (second, variants[:2])], lambda ids, before: KNOWN(before, ids))
    steps_s = [RATES.steps_s(5, 100, 3), RATES.steps_s(5, 95, 2)]
    parts_s = [(RATES.prompt_s(0, 100), steps_s[0], 0.0), (RATES.prompt_s(90, 95), steps_s[1], steps_s[1])]
    assert found.parts_s == parts_s and found.prompt_tokens == 105
    assert found.memory_bytes == 2 * 8 * 115  # the longest, twice: the prompt, and what grows from it
    assert found.disk_bytes == 8 * 115 // 2  # one method on disk, in 16 bit
    assert found.total_s == pytest.approx(sum(map(sum, parts_s)))
    assert found.shares(0).prompt + found.shares(0).forced == pytest.approx(1)
    assert found.shares(1).prompt + found.shares(1).forced < 1
    done = [found.done(number, share) for number in (0, 1) for share in (0, 0.5, 1)]
    assert done == sorted(done) and (done[0], done[-1]) == (0, pytest.approx(1)) and done[2] == done[3]
    assert found.sentence([first, second]).startswith("2 samples to measure, 105 prompt tokens to compute: about ")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rates_of_a_model(family, tmp_path):
    model, stages = tiny_model(family), []
    rates = measure_rates(
        SimpleNamespace(model=model, tokenizer=None),
        [("kvswap", Config(kv_dir=str(tmp_path)))],
        tuple(tokens(1, 1500)[0].tolist()),
        on_progress=lambda stage, *_: stages.append(stage),
        on_notice=lambda _: None,
    )
    assert rates.token_s > 0 and rates.step_s > 0 and rates.token_behind_s >= 0 and rates.step_behind_s >= 0
    offloaded = (
        model.config.num_hidden_layers if family == "llama" else model.config.layer_types.count("full_attention")
    )
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    assert (rates.token_bytes, rates.element_bytes) == (offloaded * 2 * heads * size * 4, 4)
    assert "prefill" not in stages
