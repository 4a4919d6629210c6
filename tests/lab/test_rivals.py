"""Every method behind the one interface: the laws that apply to all, and what each publishes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvswap.config import Config
from kvswap.core.attach import attach, attach_each
from kvswap.core.prefill import Prefill
from kvswap.errors import ConfigError, UnsupportedError
from kvswap.lab.rivals import find, registry
from kvswap.lab.rivals.parts.slots import NoReuse
from kvswap.lab.rivals.registry import with_methods
from tests.helpers.families import Letters, forced_logits, full_cache, tiny_model, tokens
from tests.helpers.folders import save_tiny

STEPS = 40


@pytest.fixture(autouse=True)
def _cache_home(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # no RoPE of layer types of its own, and one
@pytest.mark.parametrize("name", registry.NAMES)
def test_attending_to_everything_equals_full_attention(name, family, select_all):
    model = tiny_model(family)
    ids, forced = tokens(2, 330), tokens(2, STEPS, seed=1)
    reference = forced_logits(model, ids, forced, full_cache(model))
    exact = name != "shadowkv"  # its keys are rounded to 16 bits even at full rank
    config = select_all if exact else select_all.replace(sketch_rank=32)
    with attach(model, config, tokenizer=Letters(), method=find(name)) as cache:
        result = forced_logits(model, ids, forced, cache)
    torch.testing.assert_close(result, reference, rtol=0, atol=1e-5 if exact else 3e-3)


@pytest.mark.parametrize("name", registry.DISK)
def test_selection_does_not_depend_on_memory(name, tmp_path):
    model = tiny_model("llama")
    ids, forced = tokens(2, 600), tokens(2, STEPS, seed=1)
    config = Config(kv_dir=str(tmp_path), select_tokens=100, recent_tokens=16)
    results, rates = [], []
    for limit in ("3MiB", "8MiB"):
        with attach(model, config.replace(kv_memory=limit), tokenizer=Letters(), method=find(name)) as cache:
            results.append(forced_logits(model, ids, forced, cache))
            stats = cache.stats
            assert stats.kv_memory_peak_bytes <= stats.kv_memory_limit_bytes
            rates.append(stats.reuse_rate)
    assert torch.equal(*results)
    assert (rates[1] > 0) == (find(name).slots is not NoReuse)
    assert rates[0] <= rates[1]


@pytest.mark.parametrize("name", registry.DISK)
def test_account_of_the_sketch_agrees_with_it(name, tmp_path):
    model = tiny_model("llama")
    config = Config(kv_memory="8MiB", kv_dir=str(tmp_path), select_tokens=100)
    with attach(model, config, tokenizer=Letters(), method=find(name)) as cache:
        forced_logits(model, tokens(2, 600), tokens(2, 30), cache)
        state = cache._state
        held, allowed = sum(sketch.nbytes for sketch in state.sketches), state.ledger.reserved["sketch"]
        assert 0.8 * allowed <= held <= allowed


def test_names_are_listed_when_one_is_unknown(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="'magic'; use one of kvswap, kvswap-paper"):
        find("magic")
    with pytest.raises(ConfigError, match=r"method: got 'quest'.*kvswap\.lab\.rivals\.find\('quest'\)"):
        attach(model, method="quest").__enter__()
    with attach(model):  # nothing of the model was touched
        pass


def chosen(cache, monkeypatch):
    """Groups that decode chooses, one list a call, and the queries it had."""
    seen = []
    decode = cache._decode
    choose = decode.choose

    def watch(layer, query, step):
        groups, valid = choose(layer, query, step)
        real = groups[0] if valid is None else groups[0][valid[0]]
        seen.append((layer, query, real.tolist(), step.ends[0]))
        return groups, valid

    monkeypatch.setattr(decode, "choose", watch)
    return seen


def test_published_scheme(tmp_path, monkeypatch):
    """Held against the formulas of the paper, written out again."""
    model = tiny_model("llama")
    ids = tokens(1, 500)
    config = Config(kv_dir=str(tmp_path), select_tokens=60, recent_tokens=8, store_dtype="float32", sketch_rank=6)
    inputs, keys = {}, {}
    for index, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(lambda _, args, out, index=index: inputs.update({index: out}))
    finish = Prefill.finish

    def watch(self, layer):
        keys[layer] = self._kv[0, 0, :, :500].clone()
        finish(self, layer)

    monkeypatch.setattr(Prefill, "finish", watch)
    with attach(model, config, tokenizer=Letters(), method=find("kvswap-paper")) as cache:
        forced_logits(model, ids, ids[:, :0], cache)
        seen = chosen(cache, monkeypatch)
        bases = [sketch._matrix for sketch in cache._state.sketches]
        with torch.no_grad():
            forced_logits(model, ids[:, :1], ids[:, :0], cache)
    assert [layer for layer, *_ in seen] == [0, 1, 2]
    cos, sin = model.model.rotary_emb(inputs[0], torch.tensor([[500]]))
    for layer, query, groups, end in seen:
        source = inputs[max(0, layer - 1)]
        part = cache.parts.layers[layer]
        raw = part.attention.q_proj(source).view(1, 1, 4, 16).transpose(1, 2)
        expected = apply_rotary_pos_emb(raw, raw[:, :1], cos, sin)[0][0, :, 0]
        torch.testing.assert_close(query[0], expected)
        low_rank_keys = keys[layer].transpose(0, 1).reshape(500, -1) @ bases[layer]
        head_bases = bases[layer].view(2, 16, 6).repeat_interleave(2, 0)
        logits = torch.einsum("hd,hdr,tr->ht", expected, head_bases, low_rank_keys).mean(0)
        best = logits[: end * 4].view(end, 4).amax(1)
        wanted = sorted(best.topk(len(groups)).indices.tolist())
        assert end == 124 and len(groups) == 14
        assert len(set(groups) & set(wanted)) >= 13  # float16 rows may swap two at the edge


@pytest.mark.parametrize("name", [name for name in registry.DISK if name not in ("reload", "window")])
def test_attention_gets_the_chosen_tokens_and_no_others(name, tmp_path, monkeypatch):
    """K, V and mask of a step of two unequal sequences, held against the prompt's own K, V."""
    model = tiny_model("llama")
    lengths = (500, 310)
    ids = tokens(2, 500)
    mask = torch.tensor([[0] * (500 - n) + [1] * n for n in lengths])
    rank = 32 if name == "shadowkv" else None
    config = Config(
        kv_dir=str(tmp_path), select_tokens=80, recent_tokens=8, sink_tokens=4, store_dtype="float32", sketch_rank=rank
    )
    prompt, finish = {}, Prefill.finish

    def watch(self, layer):
        prompt[layer] = self._kv.clone()
        finish(self, layer)

    monkeypatch.setattr(Prefill, "finish", watch)
    with attach(model, config, tokenizer=Letters(), method=find(name)) as cache:
        forced_logits(model, ids * mask, ids[:, :0], cache, mask)
        monkeypatch.setattr(Prefill, "finish", finish)
        decode, window, given_to = cache._decode, cache._state.window, {}
        choose, collect = decode.choose, decode.collect
        picks = {}
        monkeypatch.setattr(decode, "choose", lambda *args: picks.setdefault(args[0], choose(*args)))
        monkeypatch.setattr(decode, "collect", lambda layer: given_to.setdefault(layer, collect(layer)))
        longer = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        forced_logits(model, ids[:, :1], ids[:, :0], cache, longer)
    for layer, (keys, values, allowed) in given_to.items():
        (groups, valid), votes = picks[layer], getattr(decode, "_votes", {}).get(layer)
        valid = np.ones(groups.shape, bool) if valid is None else valid
        for b, length in enumerate(lengths):
            end = max(window.sink_groups, length // window.group_tokens - window.recent_groups)
            picked = groups[b][valid[b]]
            assert len(picked) >= window.select_groups and (np.diff(picked) > 0).all()
            assert picked.min() >= window.sink_groups and picked.max() < end
            if votes is not None:
                assert (votes[b].sum(1) == window.select_groups).all()
            for head in range(4):
                own = picked if votes is None else picked[votes[b, head // 2][valid[b]]]
                wanted = np.concatenate(
                    (np.arange(window.sink_groups), own, np.arange(end, length // window.group_tokens + 1))
                )
                positions = (wanted[:, None] * window.group_tokens + np.arange(window.group_tokens)).ravel()
                positions = positions[positions < length]
                seen = slice(None) if allowed is None else allowed[b, head % allowed.shape[1], 0]
                pad = 500 - length
                for got, part in ((keys, 0), (values, 1)):
                    expected = prompt[layer][part, b, head // 2, pad + positions]
                    near = 0 if part or rank is None else 3e-2
                    torch.testing.assert_close(got[b, head // 2, seen][:-1], expected, rtol=0, atol=near)


def test_keys_are_not_read_where_they_are_rebuilt(tmp_path):
    model = tiny_model("llama")
    sizes = {}
    for name, changes in (("shadowkv", {}), ("quest", {})):
        config = Config(kv_dir=str(tmp_path), select_tokens=96, recent_tokens=8, backend="memory", **changes)
        with attach(model, config, method=find(name)) as cache:
            forced_logits(model, tokens(1, 900), tokens(1, 1), cache)
            stats, layout = cache.stats, cache._state.layout
            sizes[name] = stats.disk_read_bytes / layout.slot_bytes / (stats.selected_groups * (1 - stats.reuse_rate))
    assert sizes["shadowkv"] == pytest.approx(0.5)
    assert sizes["quest"] >= 1


def test_published_scheme_needs_a_calibration():
    with pytest.raises(UnsupportedError, match="tokenizer"), attach(tiny_model("llama"), method=find("kvswap-paper")):
        pass


def test_window_attends_to_sinks_and_the_newest(tmp_path):
    model = tiny_model("llama")
    ids, forced = tokens(1, 300), tokens(1, STEPS, seed=1)
    config = Config(kv_dir=str(tmp_path), select_tokens=100, store_dtype="float32")
    with attach(model, config, method=find("window")) as cache:
        result = forced_logits(model, ids, forced, cache)
        assert cache.stats.disk_reads == 0 and cache.stats.sketch == "none"
    whole = torch.cat((ids, forced), 1)
    query, key = np.arange(whole.shape[1])[:, None], np.arange(whole.shape[1])[None]
    first = np.maximum(1, query // 4 - 24) * 4
    mask = (key <= query) & ((key < 4) | (key >= first) | (query < 300))
    with torch.no_grad():
        expected = model(whole, attention_mask=torch.from_numpy(mask)[None, None]).logits[0, 299:]
    torch.testing.assert_close(result[:, 0], expected, rtol=0, atol=1e-4)


def test_methods_side_by_side_on_a_saved_model(tmp_path):
    from kvswap.models.loading import load_model

    loaded = load_model(str(save_tiny(tmp_path / "model")))
    config = Config(kv_dir=str(tmp_path / "kv"), select_tokens=100, kv_memory="4MiB")
    methods = with_methods((name, config) for name in registry.NAMES)
    with attach_each(loaded.model, methods, tokenizer=loaded.tokenizer) as caches:
        for cache in caches:
            forced_logits(loaded.model, tokens(1, 300), tokens(1, 5), cache)
    assert not list((tmp_path / "kv").iterdir())
