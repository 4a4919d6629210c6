"""A cache that adopts a prompt goes on as one that computed it."""

from __future__ import annotations

import pytest
import torch

from kvswap.config import Config
from kvswap.core.attach import attach_each
from kvswap.lab.evals.teacher_forcing import ForcedRun, force, share_prompt
from kvswap.lab.rivals.registry import with_methods
from tests.helpers.families import forced_logits, given, tiny_model, tokens


@pytest.mark.parametrize("method", ["kvswap", "full"])
@pytest.mark.parametrize(("store_dtype", "select", "difference"), [("float32", 100, 1e-6), ("float16", 800, 1e-4)])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_adopted_prompt_is_as_good_as_computed(family, store_dtype, select, difference, method, tmp_path):
    """Rounding alone tells them apart: the adopted prompt was computed with keys and values before it."""
    model, ids, forced = tiny_model(family), tokens(1, 700), tokens(1, 12, seed=1)
    config = Config(kv_dir=str(tmp_path), select_tokens=select, recent_tokens=16, chunk_tokens=512)
    config = config.replace(store_dtype=store_dtype)
    with attach_each(model, with_methods([("full", config), (method, config), (method, config)])) as (
        full,
        own,
        adopted,
    ):
        share_prompt(model, [full, adopted], ids[0].tolist())
        expected = forced_logits(model, ids, forced, own)[1:]
        with torch.no_grad():
            found = [model(input_ids=forced[:, n : n + 1], use_cache=True, **given(model, adopted)) for n in range(12)]
        assert own.get_seq_length() == adopted.get_seq_length() == 712
    torch.testing.assert_close(torch.stack([each.logits[:, -1] for each in found]), expected, rtol=0, atol=difference)


def test_forced_answer_counts_its_first_token(tmp_path):
    model, ids = tiny_model("llama"), tokens(1, 80)[0].tolist()
    config = Config(kv_dir=str(tmp_path))
    with attach_each(model, with_methods([("full", config), ("kvswap", config)])) as caches:
        row = share_prompt(model, caches, ids[:70])
        named, runs = {"full": caches[0], "kvswap": caches[1]}, {"full": ForcedRun(), "kvswap": ForcedRun()}
        force(model, named, ids[70:], dict.fromkeys(named, row), runs)
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    truth = [-float(rows[at, ids[at + 1]]) for at in range(69, 79)]
    for run in runs.values():
        assert run.expected == [int(rows[at].argmax()) == ids[at + 1] for at in range(69, 79)]
        assert [run.first_nll, *run.nll] == pytest.approx(truth, abs=1e-3)
