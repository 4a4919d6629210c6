"""Several caches fed with the same tokens: each gives the same results as alone, compared with the first."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvswap.config import Config
from kvswap.core.attach import attach, attach_each
from kvswap.lab.evals.teacher_forcing import run_forced
from kvswap.lab.rivals.registry import with_methods
from tests.helpers.families import tiny_model, tokens


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_interleaved_caches_equal_each_alone(family, tmp_path):
    model, ids = tiny_model(family), tokens(1, 700)[0].tolist()
    config = Config(kv_dir=str(tmp_path), select_tokens=100, recent_tokens=16)
    other = config.replace(group_tokens=8)
    alone = {}
    for name, values in (("four", config), ("eight", other)):
        with attach(model, values) as cache:
            alone[name] = run_forced(model, {"full": DynamicCache(config=model.config), name: cache}, ids, 20)[name]
    with attach_each(model, with_methods([("full", config), ("kvswap", config), ("kvswap", other)])) as caches:
        runs = run_forced(model, dict(zip(("full", "four", "eight"), caches, strict=True)), ids, 20)
    for name, run in alone.items():
        assert runs[name].kl == pytest.approx(run.kl, abs=1e-6)
        assert runs[name].same == run.same
    assert max(runs["four"].kl) > 1e-4  # 100 of 700 tokens are not all of them
    assert not list(tmp_path.iterdir())


def test_reference_agrees_with_itself_and_counts(tmp_path):
    model, ids = tiny_model("llama"), tokens(1, 60)[0].tolist()
    calls = []
    caches = {"a": DynamicCache(config=model.config), "b": DynamicCache(config=model.config)}
    runs = run_forced(model, caches, ids, 5, on_step=lambda done, total: calls.append((done, total)))
    assert calls == [(n + 1, 6) for n in range(6)]
    assert max(runs["b"].kl) < 1e-6 and all(runs["b"].same)
    assert len(runs["b"].kl) == len(runs["b"].step_s) == 5 and len(runs["b"].nll) == 4
    with torch.no_grad():
        row = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    truth = [-float(row[at, ids[at + 1]]) for at in range(len(ids) - 5, len(ids) - 1)]
    assert runs["a"].nll == pytest.approx(truth, abs=1e-4)


def test_the_model_is_restored_after_a_failing_cache(tmp_path):
    model = tiny_model("llama")
    forward = model.model.layers[0].forward
    bad = Config(kv_dir=str(tmp_path), backend="memory", kv_memory="1KiB")
    with (
        pytest.raises(Exception, match="kv_memory"),
        attach_each(model, with_methods([("full", bad), ("kvswap", bad)])) as caches,
    ):
        run_forced(model, {"full": caches[0], "kvswap": caches[1]}, tokens(1, 50)[0].tolist(), 5)
    assert model.model.layers[0].forward == forward
