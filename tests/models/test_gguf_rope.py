"""RoPE scaling that a GGUF file states is in the converted model, or the file is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kvswap.errors import ModelError
from kvswap.models.adapter import context_limit
from kvswap.models.loading import load_model
from tests.models.test_loading import HEADS, HIDDEN, write_gguf

LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.fixture(autouse=True, params=["auto", "float"])
def _weights(request, tmp_path, monkeypatch) -> None:
    """Files that run as they are, and those that are converted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tests.models.test_gguf_rope.load_model", partial(load_model, weights=request.param))


def frequencies(**rope: Any) -> torch.Tensor:
    """The frequencies of a model with these parameters."""
    parameters = {"rope_theta": 10000.0, **rope}
    config = LlamaConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, max_position_embeddings=512, rope_parameters=parameters
    )
    return LlamaRotaryEmbedding(config).inv_freq


def load(tmp_path: Path, add: Callable[[gguf.GGUFWriter], None]) -> Any:
    return load_model(str(write_gguf(tmp_path / "tiny.gguf", add=add))).model


def scaled(kind: gguf.RopeScalingType, factor: float, original: int | None = None) -> Callable[[gguf.GGUFWriter], None]:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(factor)
        if original is not None:
            writer.add_rope_scaling_orig_ctx_len(original)

    return add


def test_no_scaling_stays_none(tmp_path):
    for number, add in enumerate((lambda writer: None, scaled(gguf.RopeScalingType.NONE, 1.0))):
        (tmp_path / str(number)).mkdir()
        assert torch.equal(
            load(tmp_path / str(number), add).model.rotary_emb.inv_freq, frequencies(rope_type="default")
        )


def test_linear(tmp_path):
    model = load(tmp_path, scaled(gguf.RopeScalingType.LINEAR, 4.0))
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies(rope_type="linear", factor=4.0))
    assert not torch.equal(model.model.rotary_emb.inv_freq, frequencies(rope_type="default"))


def test_yarn(tmp_path):
    model = load(tmp_path, scaled(gguf.RopeScalingType.YARN, 4.0, 512))
    expected = frequencies(rope_type="yarn", factor=4.0, original_max_position_embeddings=512)
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)
    assert model.model.rotary_emb.attention_scaling > 1
    assert context_limit(model) == 2048


def factors() -> np.ndarray:
    """What a converter writes for Llama 3.2."""
    plain, stretched = frequencies(rope_type="default"), frequencies(rope_type="llama3", **LLAMA3)
    return (plain / stretched).numpy().astype(np.float32)


def test_factors_of_llama_3(tmp_path):
    assert factors().max() > 1
    model = load(tmp_path, lambda writer: writer.add_tensor("rope_freqs.weight", factors()))
    expected = frequencies(rope_type="llama3", **LLAMA3)
    assert torch.allclose(model.model.rotary_emb.inv_freq, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "add",
    [
        lambda writer: writer.add_tensor("rope_freqs.weight", factors()[::-1].copy()),
        lambda writer: writer.add_tensor("rope_freqs.weight", factors()[:-1].copy()),
        lambda writer: writer.add_tensor("rope_factors_long.weight", factors()),
        scaled(gguf.RopeScalingType.LONGROPE, 4.0),
    ],
)
def test_scaling_that_cannot_be_expressed_is_refused(tmp_path, add):
    with pytest.raises(ModelError, match="RoPE scaling cannot be converted"):
        load(tmp_path, add)


def test_missing_tensor_of_a_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.models.test_loading.LAYERS", 1)
    count = "llama.block_count"
    with pytest.raises(ModelError, match=r"lack 9 tensors: model\.layers\.1"):
        load(
            tmp_path, lambda writer: writer.kv_data[0].__setitem__(count, gguf.GGUFValue(2, gguf.GGUFValueType.UINT32))
        )
