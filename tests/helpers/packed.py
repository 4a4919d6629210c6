"""Packed weights for tests: random blocks of every type, and tiny models in GGUF files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

from kvswap.weights.gguf_file import TYPES
from tests.helpers.families import tiny_model

COMPILED = (0, 1, 30, 2, 3, 6, 7, 8, 12, 13, 14)
"""Types with compiled products, by number."""
_HALVES = {2: (0,), 3: (0, 2), 6: (0,), 7: (0, 2), 8: (0,), 12: (0, 2), 13: (0, 2), 14: (208,)}
"""Where a block has float16."""


def random_rows(kind: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """``[rows, row bytes]`` uint8: every code is as likely as every other, scales are small."""
    noise = np.random.default_rng([seed, kind])
    _name, block, block_bytes = TYPES[kind]
    floats = noise.standard_normal((rows, columns), np.float32)
    if kind in (0, 1, 30):
        if kind == 30:
            return torch.from_numpy(floats).bfloat16().view(torch.uint8)
        return torch.from_numpy(floats).to(torch.float16 if kind else torch.float32).view(torch.uint8)
    found = noise.integers(0, 256, (rows, columns // block, block_bytes), np.uint8)
    for place in _HALVES[kind]:
        scales = 0.02 * noise.standard_normal((rows, columns // block, 1))
        found[:, :, place : place + 2] = scales.astype(np.float16).view(np.uint8)
    return torch.from_numpy(found.reshape(rows, -1))


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA3 = {
    **NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def packable_model(family: str) -> PreTrainedModel:
    """A tiny model that a GGUF file states wholly: it says neither which layers of Gemma 3 slide nor their scaling."""
    gemma3 = {"num_hidden_layers": 7, "layer_types": None, "query_pre_attn_scalar": 16}
    return tiny_model(family, vocab_size=300, **(gemma3 if family == "gemma3" else {}))


def write_model(
    path: Path,
    model: PreTrainedModel,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    add: Callable[[gguf.GGUFWriter], None] | None = None,
    without: str = "",
    split_max_tensors: int = 0,
) -> Path:
    """A tiny model as a GGUF file, as llama.cpp's converter would write it, with a tokenizer of bytes.

    Matrices whose columns are no whole blocks of ``kind`` stay float32. ``without`` leaves out a tensor.
    """
    config = model.config
    family = {"gemma3_text": "gemma3", "mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, family, split_max_tensors=split_max_tensors)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope: dict[str, Any] = config.rope_parameters
    writer.add_rope_freq_base(float((rope.get("full_attention") or rope)["rope_theta"]))
    writer.add_key_length(config.head_dim)
    if family == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    _add_tokenizer(writer, config.vocab_size)
    names, heads = (_GEMMA3 if family == "gemma3" else NAMES), {"q_proj": config.num_attention_heads}
    heads["k_proj"] = config.num_key_value_heads
    for name, tensor in model.state_dict().items():
        if name == without or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        values = tensor.numpy()
        part = name.split(".")[-2]
        if family == "llama" and part in heads:  # halves to pairs
            shaped = values.reshape(heads[part], 2, config.head_dim // 2, *values.shape[1:])
            values = shaped.swapaxes(1, 2).reshape(values.shape)
        if family == "gemma3" and name.endswith("norm.weight"):
            values = values + 1
        values, packed = np.ascontiguousarray(values), None
        if values.ndim > 1 and values.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            packed = gguf.quantize(values, kind)
        writer.add_tensor(
            _tensor_name(name, names),
            values if packed is None else packed,
            raw_dtype=kind if packed is not None else None,
        )
    if add is not None:
        add(writer)
    return finished(writer, path)


def finished(writer: gguf.GGUFWriter, path: Path) -> Path:
    """Write everything that was added, and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """A tokenizer of ``size`` words: bytes, and fillers where that is more."""
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    words = (words + [f"<{number}>" for number in range(len(words), size)])[:size]
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * (size - 2))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _tensor_name(name: str, names: dict[str, str]) -> str:
    stem, _, ending = name.rpartition(".")
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if stem in top:
        return f"{top[stem]}.{ending}"
    _model, _layers, number, *rest = stem.split(".")
    return f"blk.{number}.{names['.'.join(rest)]}.{ending}"
