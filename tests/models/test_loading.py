"""Names become models: dtypes, mapped or copied weights, GGUF files converted once."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

import kvswap.models.gguf as conversion
from kvswap.disk.folders import models_folder
from kvswap.errors import ConfigError, ModelError
from kvswap.models import loading
from kvswap.models.hub import Problem, look_like_path
from kvswap.models.loading import LoadedModel, copy_weights, load_model
from tests.helpers.families import tiny_model
from tests.helpers.folders import save_tiny
from tests.helpers.packed import finished

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 64, 128, 4, 2, 2


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_gguf(path: Path, seed: int = 0, add: Callable[[gguf.GGUFWriter], None] | None = None) -> Path:
    """A llama of two layers with random weights and a tokenizer of bytes; ``add`` writes more keys and tensors."""
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * (len(words) - 2))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    noise = np.random.default_rng(seed)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd": (len(words), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.{name}": (HIDDEN, HIDDEN) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{layer}.{name}": (kv, HIDDEN) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{layer}.{name}": (INNER, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{layer}.ffn_down"] = (HIDDEN, INNER)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", noise.standard_normal(shape, dtype=np.float32))
    if add is not None:
        add(writer)
    return finished(writer, path)


def test_gguf_is_converted_once(tmp_path):
    file = write_gguf(tmp_path / "tiny model.gguf")
    notices: list[str] = []
    loaded = load_model(str(file), weights="float", on_notice=notices.append)
    assert loaded.model.dtype == torch.float32
    assert not hasattr(loaded.model.config, "quantization_config")
    assert loaded.tokenizer.decode(loaded.tokenizer("a thing")["input_ids"], skip_special_tokens=True) == "a thing"
    assert len(notices) == 1 and "once" in notices[0]
    moved = file.rename(tmp_path / "tiny model.GGUF")
    again = load_model(str(moved), weights="float", on_notice=notices.append)
    assert torch.equal(again.model.lm_head.weight, loaded.model.lm_head.weight)
    assert len(notices) == 1
    assert len(os.listdir(models_folder())) == 1


def test_other_weights_under_the_same_name_are_converted_anew(tmp_path):
    file = tmp_path / "tiny.gguf"
    first = load_model(str(write_gguf(file, seed=0)), weights="float").model.lm_head.weight
    second = load_model(str(write_gguf(file, seed=1)), weights="float").model.lm_head.weight
    assert not torch.equal(first, second)


def test_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    file = write_gguf(tmp_path / "tiny.gguf")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(conversion, "_write", interrupt)
        load_model(str(file), weights="float")
    assert os.listdir(models_folder()) == []
    load_model(str(file), weights="float")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_gguf_without_its_packages(package, tmp_path, monkeypatch):
    """The error names the extra; what was converted earlier, and model directories, load all the same."""
    file, other = write_gguf(tmp_path / "tiny.gguf"), write_gguf(tmp_path / "other.gguf", seed=1)
    load_model(str(file), weights="float")
    save_tiny(tmp_path / "folder")
    monkeypatch.setitem(sys.modules, package, None)
    notices: list[str] = []
    with pytest.raises(ModelError, match=rf"needs {package} .*pip install 'kvswap\[gguf\]'"):
        load_model(str(other), weights="float", on_notice=notices.append)
    load_model(str(file), weights="float", on_notice=notices.append)
    load_model(str(tmp_path / "folder"), on_notice=notices.append)
    assert notices == []


def test_truncated_gguf(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    os.truncate(file, file.stat().st_size - 3000)
    with pytest.raises(ModelError, match="reaches past the end of the file"):
        load_model(str(file), weights="float")
    assert not models_folder().exists()


def test_damaged_gguf_headers(tmp_path):
    """Lengths and names of the header become absurd: it loads, or there is one clear error."""
    file, rng, refused = tmp_path / "tiny.gguf", random.Random(0), 0
    whole = write_gguf(file).read_bytes()
    for _ in range(40):
        start = rng.randrange(4, 6000)
        damaged = bytearray(whole)
        damaged[start : start + 8] = rng.choice((b"\xff" * 8, bytes(8), rng.randbytes(8)))
        file.write_bytes(damaged)
        try:
            conversion.converted(file, lambda text: None)
        except ModelError as error:
            refused += 1
            assert "the GGUF file cannot be read" in str(error)
    assert refused > 20


def test_dtype_of_the_checkpoint_unless_the_cpu_cannot(tmp_path, monkeypatch):
    whole = save_tiny(tmp_path / "whole")
    half = tmp_path / "half"
    save_tiny(half)
    tiny_model("llama", vocab_size=259).to(torch.bfloat16).save_pretrained(half)
    for able, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(loading, "has_bfloat16", lambda able=able: able)
        assert load_model(str(whole)).model.dtype == torch.float32
        assert load_model(str(half)).model.dtype == (torch.bfloat16 if torch.cuda.is_available() else expected)
    assert load_model(str(whole), dtype="float16").model.dtype == torch.float16
    with pytest.raises(ConfigError, match="dtype: got 'int8'"):
        load_model(str(whole), dtype="int8")


def test_model_is_ready_to_attach(tmp_path):
    model = load_model(str(save_tiny(tmp_path / "m"))).model
    assert model.config._attn_implementation == "sdpa"
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_copied_weights_are_our_own_and_stay_tied():
    model = tiny_model("gemma3")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old = list(model.state_dict().values())  # alive, so that their places are not given out again
    copy_weights(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not {tensor.data_ptr() for tensor in old} & {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_views_that_share_memory_share_it_after_copying():
    module = torch.nn.ParameterList([torch.nn.Parameter(torch.arange(6.0))])
    module.append(torch.nn.Parameter(module[0].data))
    copy_weights(module)
    assert module[0].data_ptr() == module[1].data_ptr()


@pytest.mark.parametrize("name", ["./a", "/a/b", "~/a", "a/b/c", "x.gguf", "a b"])
def test_names_that_are_paths(name):
    assert look_like_path(name)
    assert not look_like_path("org/model-1.5")


def test_cached_hub_model_is_used_when_the_hub_is_away(monkeypatch):
    monkeypatch.setattr(loading, "problem_with", lambda name: Problem("the hub cannot be reached"))
    monkeypatch.setattr(loading, "has_cached", lambda name: True)
    seen = []
    monkeypatch.setattr(loading, "_load", lambda name, source, local, *rest: seen.append((source, local)) or 1 / 0)
    notices: list[str] = []
    with pytest.raises(ZeroDivisionError):
        load_model("org/model", on_notice=notices.append)
    assert seen == [("org/model", True)]
    assert "local cache is used" in notices[0]


def test_files_for_others_do_not_say_where_a_model_lies(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.chdir(folder)
    names = [LoadedModel(None, None, name).short_name for name in (str(folder), f"{folder}/", ".", "someone/model")]
    assert names == ["mine", "mine", "mine", "someone/model"]
