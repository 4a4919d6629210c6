"""The meter against full attention of the same context: what it says selection cost, and that it changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from kvswap.app.quality import QualityMeter
from kvswap.config import Config
from kvswap.core.attach import attach, attach_each
from kvswap.errors import UnsupportedError
from kvswap.lab.rivals.registry import find, with_methods
from tests.helpers.families import FAMILIES, forced_logits, given, other_model, tiny_model, tokens

PROMPT = 700


def step(model, cache, token):
    with torch.no_grad():
        return model(input_ids=token[:, None], use_cache=True, **given(model, cache)).logits[0, -1]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma 2 (softcap)"])
def test_kl_of_the_first_step_is_that_of_full_attention(family, tmp_path):
    model = tiny_model(family) if family in FAMILIES else other_model(family)
    ids, token = tokens(1, PROMPT), tokens(1, 1, seed=1)[:, 0]
    config = Config(kv_dir=str(tmp_path), select_tokens=60, recent_tokens=16, store_dtype="float32")
    with attach_each(model, with_methods([("full", config), ("kvswap", config)])) as (full, ours):
        forced_logits(model, ids, ids[:, :0], full)
        forced_logits(model, ids, ids[:, :0], ours)
        meter = QualityMeter(model, ours)
        meter.remember()
        exact, found = step(model, full, token), step(model, ours, token)
        kept, kl = meter.check(int(token[0]), found)
        expected = functional.kl_div(found.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="sum")
    assert kl == pytest.approx(float(expected), rel=1e-2, abs=1e-7) and kl > 1e-6
    assert 60 / PROMPT < kept < 0.9
    assert meter.stats.checks == 1 and meter.stats.mass_kept == meter.stats.mass_kept_least == kept


@pytest.mark.parametrize("family", ["qwen3", "gemma 2 (softcap)", "gpt-oss (sinks)"])
def test_everything_selected_is_everything_kept(family, tmp_path):
    model = tiny_model(family) if family in FAMILIES else other_model(family)
    ids, token = tokens(1, PROMPT), tokens(1, 1, seed=1)[:, 0]
    with attach(model, Config(kv_dir=str(tmp_path), select_tokens=2000, store_dtype="float32")) as cache:
        forced_logits(model, ids, ids[:, :0], cache)
        meter = QualityMeter(model, cache)
        meter.remember()
        kept, kl = meter.check(int(token[0]), step(model, cache, token))
    assert kept == pytest.approx(1, abs=1e-5) and kl == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_checks_change_no_token(family, tmp_path, monkeypatch):
    model, ids = tiny_model(family), tokens(1, PROMPT)
    config = Config(kv_dir=str(tmp_path), select_tokens=60, recent_tokens=16)
    answers, meters = [], []
    monkeypatch.setattr("kvswap.app.quality.COST_SHARE", 1e9)  # every step
    for watched in (False, True):
        with attach(model, config) as cache:
            meter = QualityMeter(model, cache)
            watch = {"logits_processor": [meter]} if watched else {}
            answers.append(model.generate(ids, max_new_tokens=12, do_sample=False, **watch, **given(model, cache)))
            meters.append(meter.stats)
    assert torch.equal(*answers)
    assert meters[0] is None and meters[1].checks == 11


def test_checks_cost_what_is_said(tmp_path):
    """The first step is checked, then none before 20 times the time of a check has passed."""
    model, ids = tiny_model("llama"), tokens(1, PROMPT)
    with attach(model, Config(kv_dir=str(tmp_path), select_tokens=60, recent_tokens=16)) as cache:
        meter = QualityMeter(model, cache)
        model.generate(ids, max_new_tokens=6, do_sample=False, logits_processor=[meter], **given(model, cache))
        assert meter.stats.checks == 1


def test_methods_that_cannot_be_checked(tmp_path):
    model, config = tiny_model("llama"), Config(kv_dir=str(tmp_path))
    with attach(model, config, method=find("reload")) as cache, pytest.raises(UnsupportedError, match="method reload"):
        QualityMeter(model, cache)
