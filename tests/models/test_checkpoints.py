"""Checkpoints that are incomplete, run code, need a package or another attention: one clear error, or they work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

from kvswap.errors import ModelError
from kvswap.models.loading import load_model
from tests.helpers.folders import byte_tokenizer, save_tiny


def edit_weights(folder: Path, change: Any) -> None:
    """Let ``change`` edit the dictionary of tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def edit_config(folder: Path, name: str = "config.json", **changes: Any) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_tiny(tmp_path / "m", family="qwen2", tie_word_embeddings=False)


def test_any_missing_or_renamed_tensor_is_named(folder):
    """Every single tensor: absent, and under another name."""
    whole = load_file(folder / "model.safetensors")
    for name in whole:
        for other in (None, f"old.{name}"):
            tensors = {key: value for key, value in whole.items() if key != name}
            if other:
                tensors[other] = whole[name]
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            with pytest.raises(ModelError, match=f"its weights lack 1 tensor: {name}") as caught:
                load_model(str(folder))
            assert other is None or other in str(caught.value)


def test_tied_head_is_not_missing(tmp_path):
    folder = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    notices: list[str] = []
    model = load_model(str(folder), on_notice=notices.append).model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert notices == []


def test_tensors_that_are_not_used_are_said(folder):
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.o_proj.bias"] = torch.ones(64)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit_weights(folder, add)
    notices: list[str] = []
    load_model(str(folder), on_notice=notices.append)
    assert len(notices) == 1 and "o_proj.bias" in notices[0] and "inv_freq" not in notices[0]


def test_tensor_of_another_shape_is_an_error(folder):
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(ModelError, match="weights"):
        load_model(str(folder))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_checkpoint_never_runs(folder, file, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked on the terminal"))
    (folder / "own.py").write_text("raise SystemExit('its code ran')")
    if file == "config.json":
        edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    else:
        edit_config(folder, file, tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.T"]})
        (folder / "tokenizer.json").unlink()
    own = "Python code of its own, which kvswap never runs"
    with pytest.raises(ModelError, match=own if file == "config.json" else "tokenizer"):
        load_model(str(folder))


def test_pickled_weights_are_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"read from \.safetensors files only"):
        load_model(str(folder))


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "hqq"},
    ],
)
def test_quantised_weights_without_their_package(folder, settings):
    edit_config(folder, quantization_config=settings)
    with pytest.raises(ModelError, match=r"install|quantised \(") as caught:
        load_model(str(folder))
    assert "damaged" not in str(caught.value)


def test_tokenizer_without_its_package(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x05\n\x01a\x15\x00\x00\x00\x00")
    edit_config(folder, "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    edit_config(folder, model_type="llama")
    with pytest.raises(ModelError, match="install"):
        load_model(str(folder))


def test_family_without_sdpa_loads_with_its_own_attention(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}
    GptOssForCausalLM(GptOssConfig(vocab_size=259, **sizes, **more)).save_pretrained(tmp_path)
    byte_tokenizer("x").save_pretrained(tmp_path)
    notices: list[str] = []
    assert load_model(str(tmp_path), on_notice=notices.append).model.config._attn_implementation == "eager"
    assert "eager" in notices[0]
