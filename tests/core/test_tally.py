"""What decode steps attended to: the sums of compiled steps are those of Python, and those of the choices made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kvswap
from kvswap.config import Config
from kvswap.core.decode import Decode
from kvswap.lab.rivals import find
from kvswap.selection.tally import Tally
from tests.helpers.families import tiny_model, tokens
from tests.helpers.folders import byte_tokenizer

SINKS, GROUP = 4, 4


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", max_position_embeddings=4096, vocab_size=300)


def run(model, folder, steps=6, batch=1, prompt=900, **settings):
    """The tally and the stats after some steps, and what the steps chose."""
    config = Config(**{"kv_dir": str(folder), "select_tokens": 120, "store_dtype": "float32", **settings})
    ids, chosen = tokens(batch, prompt + steps), []
    with kvswap.attach(model, config, tokenizer=byte_tokenizer()) as cache, torch.no_grad():
        model(ids[:, :prompt], cache=cache)
        assert cache.tally.choices == 0 and cache.stats.mass_kept == 1
        for n in range(prompt, prompt + steps):
            model(ids[:, n : n + 1], cache=cache)
            chosen += [cache._decode.chosen(layer)[0].copy() for layer in range(cache._state.shape.layers)]
        tally, stats = cache.tally, cache.stats
        return tally.groups.clone(), tally.choices, stats, chosen, tally.squares.clone()


@pytest.mark.parametrize("batch", [1, 2])
def test_compiled_steps_count_what_python_counts(model, tmp_path, batch) -> None:
    ours = run(model, tmp_path, batch=batch)
    theirs = run(model, tmp_path, batch=batch, compiled_step="off")
    assert ours[1] == theirs[1] == 6 * batch * model.config.num_hidden_layers
    assert ours[2].mass_kept == pytest.approx(theirs[2].mass_kept, abs=1e-4)
    assert torch.allclose(ours[0], theirs[0], atol=1e-4) and torch.allclose(ours[4], theirs[4], atol=1e-4)
    assert 0 < float(ours[4].sum()) < ours[1]


@pytest.mark.parametrize("compiled", ["auto", "off"])
def test_only_groups_that_were_chosen_have_a_share(model, tmp_path, compiled) -> None:
    shares, choices, stats, chosen, _ = run(model, tmp_path, compiled_step=compiled)
    picked = np.unique(np.concatenate([each.ravel() for each in chosen]))
    assert shares[0].nonzero().flatten().tolist() == picked.tolist()
    assert picked.min() >= SINKS // GROUP
    assert 0 < float(shares.sum()) < choices * stats.mass_kept  # sinks are kept as well, and have no share
    assert 0 < stats.mass_kept < 1


def test_the_estimate_is_that_of_the_scores(model, tmp_path, monkeypatch) -> None:
    """Against sums in another order, over the scores that the choices were made by."""
    kept, real = [], Decode.choose

    def choose(self, layer, query, step):
        groups, valid = real(self, layer, query, step)
        state = self.state
        mass = state.method.score(state.sketches[layer], query, state.shape.scaling, GROUP)[0].double().numpy()
        inside = set(groups[0].tolist()) | set(range(SINKS // GROUP)) | set(range(int(step.ends[0]), len(mass)))
        kept.append(mass[sorted(inside)].sum() / mass.sum())
        return groups, valid

    monkeypatch.setattr(Decode, "choose", choose)
    stats = run(model, tmp_path, compiled_step="off")[2]
    assert stats.mass_kept == pytest.approx(np.mean(kept), abs=1e-6)


def test_nothing_is_counted_where_nothing_is_left_out(model, tmp_path) -> None:
    shares, choices, stats, *_ = run(model, tmp_path, select_tokens=2000)
    assert choices == 0 and stats.mass_kept == 1 and not shares.any()


def test_a_method_that_does_not_estimate_says_so(model, tmp_path) -> None:
    config = Config(kv_dir=str(tmp_path), select_tokens=120)
    with kvswap.attach(model, config, method=find("kvswap-paper"), tokenizer=byte_tokenizer()) as cache:
        with torch.no_grad():
            model(tokens(1, 900), cache=cache)
            model(tokens(1, 1), cache=cache)
        assert cache.tally is None and cache.stats.mass_kept is None


def test_a_context_that_grows_keeps_its_shares(model, tmp_path) -> None:
    shares = run(model, tmp_path, steps=300, prompt=900)[0]
    assert shares.shape[1] >= 1200 // GROUP
    tally = Tally(1, 4, GROUP, torch.device("cpu"))
    tally.groups += 1
    tally.grow(3)
    assert tally.groups.shape == (1, 4)
    tally.grow(9)
    assert tally.groups[0].tolist() == [1.0] * 4 + [0.0] * 5 and tally.fields.columns == 9
    assert (tally.fields.groups, tally.fields.squares) == (tally.groups.data_ptr(), tally.squares.data_ptr())
    tally.reset()
    assert not tally.groups.any()


def test_shares_of_an_answer_are_its_own(model, tmp_path) -> None:
    """``since`` separates the estimate of one answer from that of those before."""
    config = Config(kv_dir=str(tmp_path), select_tokens=120)
    with kvswap.attach(model, config, tokenizer=byte_tokenizer()) as cache, torch.no_grad():
        model(tokens(1, 900), cache=cache)
        for n in range(5):
            model(tokens(1, 1, seed=n), cache=cache)
        before = cache.stats
        model(tokens(1, 1, seed=9), cache=cache)
        after = cache.stats
    layers = model.config.num_hidden_layers
    expected = after.mass_kept * 6 - before.mass_kept * 5
    assert after.since(before)["mass_kept"] == pytest.approx(expected, abs=1e-6)
    assert (before.choices, after.choices) == (5 * layers, 6 * layers)
