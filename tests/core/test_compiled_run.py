"""Steps that go through all layers in one call, against the same steps layer by layer and through modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvswap.core import compiled_layers
from kvswap.core.attach import attach
from kvswap.core.compiled_run import CompiledRun
from kvswap.errors import DamagedError, DiskError, ModelError, UnsupportedError
from kvswap.native import step_loops
from tests.core.test_compiled_step import COMPILED, config, model_of
from tests.helpers.families import Letters, forced_logits, tiny_model, tokens

pytestmark = pytest.mark.skipif(not step_loops.available(), reason="no compiled loops: there was no C compiler")

MEMORY = {"everything in memory": "32MiB", "most groups on disk": "1200KiB"}


def at_once(cache) -> bool:
    """Whether the last step went through all layers in one call."""
    return isinstance(cache.decode, CompiledRun) and cache.decode.at_once


def steps(model, settings, batch=1, ids=None, forced=None):
    """Logits, what every layer chose, whether all layers went at once, and counters."""
    ids = tokens(batch, 700) if ids is None else ids
    forced = tokens(batch, 12, seed=1) if forced is None else forced
    with attach(model, settings, tokenizer=Letters()) as cache:
        logits = forced_logits(model, ids, forced, cache)
        stats = cache.stats
        chosen = [cache.decode.chosen(order)[0].copy() for order in range(len(cache.parts.offloaded))]
        counters = stats.selected_groups, stats.disk_reads, stats.disk_read_bytes, stats.reuse_rate
        return logits, chosen, at_once(cache), counters


@pytest.fixture
def by_layer(monkeypatch):
    """Have steps go layer by layer from now on."""

    def apply():
        prove = compiled_layers.prove

        def never_joined(parts, implementation, found):
            prove(parts, implementation, found)
            found.joined = False

        monkeypatch.setattr(compiled_layers, "prove", never_joined)
        compiled_layers._proved.clear()

    yield apply
    compiled_layers._proved.clear()


@pytest.mark.parametrize("family", COMPILED)
def test_every_family_gives_what_its_modules_give(family, tmp_path, cache_home):
    model = model_of(family)
    plain, expected, _, _ = steps(model, config(tmp_path, compiled_step="off"))
    compiled, chosen, whole, _ = steps(model, config(tmp_path))
    assert whole
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)
    assert all(map(np.array_equal, chosen, expected))


@pytest.mark.parametrize("memory", MEMORY.values(), ids=MEMORY)
@pytest.mark.parametrize("batch", [1, 3])
def test_all_layers_at_once_are_bit_equal_with_one_after_the_other(batch, memory, tmp_path, cache_home, by_layer):
    model, settings = tiny_model("llama"), config(tmp_path, kv_memory=memory)
    if memory != "32MiB" and batch > 1:
        settings = settings.replace(kv_memory="1460KiB")
    logits, chosen, whole, counters = steps(model, settings, batch)
    by_layer()
    expected, groups, other, others = steps(model, settings, batch)
    assert whole and not other
    assert torch.equal(logits, expected) and all(map(np.array_equal, chosen, groups))
    assert (counters[1] > 0) == (memory != "32MiB")
    assert counters[0] == others[0] and counters[2] == pytest.approx(others[2], rel=0.1)


def test_padded_batches_and_short_contexts_go_at_once_too(tmp_path, cache_home, by_layer):
    model, width, lengths = tiny_model("qwen3"), 40, (1, 9, 40)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    found = []
    for _ in range(2):
        with attach(model, config(tmp_path), tokenizer=Letters()) as cache:
            found.append(forced_logits(model, tokens(3, width) * mask, tokens(3, 40, seed=1), cache, mask))
            assert at_once(cache) == (len(found) == 1)
        by_layer()
    assert torch.equal(*found)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_that_changes_hidden_states_between_layers_goes_layer_by_layer(in_place, tmp_path, cache_home):
    model = tiny_model("llama")
    kind = type(model.model.layers[0])

    def moves(self, hidden, **kwargs):
        return kind.__call__(self, hidden.add_(0.01) if in_place else hidden + 0.01, **kwargs)

    model.model.layers[1].__class__ = type("Moves", (kind,), {"__call__": moves})
    plain, _, _, _ = steps(model, config(tmp_path, compiled_step="off"))
    compiled, _, whole, _ = steps(model, config(tmp_path))
    assert not whole
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)


def test_a_model_that_gives_its_layers_other_arguments_goes_layer_by_layer(tmp_path, cache_home):
    model = tiny_model("llama")
    kind = type(model.model.layers[0])

    def other(self, hidden, **kwargs):
        cos, sin = kwargs.pop("position_embeddings")
        return kind.__call__(self, hidden, position_embeddings=(cos.clone(), sin.clone()), **kwargs)

    model.model.layers[2].__class__ = type("Other", (kind,), {"__call__": other})
    plain, _, _, _ = steps(model, config(tmp_path, compiled_step="off"))
    compiled, _, whole, _ = steps(model, config(tmp_path))
    assert not whole
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)


def test_a_forward_that_was_put_before_ours_is_called(tmp_path, cache_home):
    model, called = tiny_model("llama"), []
    with attach(model, config(tmp_path), tokenizer=Letters()) as cache:
        forced_logits(model, tokens(1, 500), tokens(1, 2), cache)
        assert at_once(cache)
        layer = model.model.layers[1]
        ours = layer.forward
        layer.forward = lambda *args, **kwargs: called.append(1) or ours(*args, **kwargs)
        forced_logits(model, tokens(1, 1), tokens(1, 2), cache)
        layer.forward = ours
        assert len(called) == 3 and not at_once(cache)


def test_hidden_states_of_all_layers_are_those_of_modules(tmp_path, cache_home):
    model, found = tiny_model("llama"), []
    for way in ("off", "auto"):
        with attach(model, config(tmp_path, compiled_step=way), tokenizer=Letters()) as cache, torch.no_grad():
            forced_logits(model, tokens(1, 500), tokens(1, 2), cache)
            out = model(input_ids=tokens(1, 1, seed=3), cache=cache, output_hidden_states=True)
            found.append(torch.stack(out.hidden_states))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [lambda hidden: hidden + 0.01, lambda hidden: hidden.add_(0.01)])
def test_hidden_states_that_change_after_all_are_an_error(change, tmp_path, cache_home):
    """What was tried at attach is looked at in every step, since all layers have been computed by then."""
    model = tiny_model("llama")
    kind = type(model.model.layers[0])
    with attach(model, config(tmp_path), tokenizer=Letters()) as cache:
        forced_logits(model, tokens(1, 500), tokens(1, 2), cache)
        assert at_once(cache)
        moves = {"__call__": lambda self, hidden, **kwargs: kind.__call__(self, change(hidden), **kwargs)}
        model.model.layers[1].__class__ = type("Moves", (kind,), moves)
        with pytest.raises(ModelError, match="changed between layers"):
            forced_logits(model, tokens(1, 1), tokens(1, 1), cache)


def test_a_failed_read_is_an_error_and_the_cache_says_so_afterwards(tmp_path, cache_home, monkeypatch):
    model = tiny_model("llama")
    with attach(model, config(tmp_path, kv_memory="1200KiB"), tokenizer=Letters()) as cache:
        forced_logits(model, tokens(1, 700), tokens(1, 2), cache)
        backend, wait = cache._state.store.backend, cache._state.store.backend.wait

        def fails(ticket):
            wait(ticket)
            raise DiskError("read failed", hint="")

        monkeypatch.setattr(backend, "wait", fails)
        with pytest.raises(DiskError):
            forced_logits(model, tokens(1, 4, seed=5)[:, :1], tokens(1, 8, seed=4), cache)
        monkeypatch.setattr(backend, "wait", wait)
        with pytest.raises(UnsupportedError, match="broke off"):
            forced_logits(model, tokens(1, 1), tokens(1, 1), cache)


@pytest.mark.parametrize("change", ["slots", "ends", "tail", "offset", "hidden", "count"])
def test_what_lies_outside_is_refused(change, tmp_path, cache_home, monkeypatch):
    """By compiled code, or in front of it: a mistake of ours must not reach other memory."""
    model = tiny_model("llama")
    with attach(model, config(tmp_path), tokenizer=Letters()) as cache:
        forced_logits(model, tokens(1, 500), tokens(1, 2), cache)
        run = cache.decode._run
        begin, describe = run.begin, run.describe

        def wrong_begin(hidden, *given, **named):
            for name in {"ends", "tail", "offset"} & {change}:
                named[name] = named[name] + 10_000
            begin(hidden[..., :-1] if change == "hidden" else hidden, *given, **named)

        def wrong_describe(number, count, sketch, slots):
            few = step_loops.Slots(slots.data, 1, slots.slot_bytes, slots.type, slots.group_tokens)
            kept.append(few)
            describe(number, 10_000 if change == "count" else count, sketch, few if change == "slots" else slots)

        kept = []
        monkeypatch.setattr(run, "begin", wrong_begin)
        monkeypatch.setattr(run, "describe", wrong_describe)
        with pytest.raises(ValueError, match=r"do not exist|hidden states|room for"):
            forced_logits(model, tokens(1, 1), tokens(1, 1), cache)


def test_a_score_that_is_no_number_names_its_layer(tmp_path, cache_home):
    model = tiny_model("llama")
    with attach(model, config(tmp_path), tokenizer=Letters()) as cache:
        forced_logits(model, tokens(1, 500), tokens(1, 1), cache)
        model.model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))
        with pytest.raises(DamagedError, match="layer 2"):
            forced_logits(model, tokens(1, 1), tokens(1, 1), cache)
