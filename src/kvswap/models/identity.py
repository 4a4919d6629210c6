"""Which model, tokenizer and positions stored K, V belong to: hashes that change when tokens would.

Weights are sampled at three places of every parameter, so that a mapped file of many GiB is not read for it; that tells
models and fine-tunes apart, and is no proof against a change of single weights.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from kvswap.models.adapter import ModelParts

_SAMPLE = 64
_VOCABULARY_SAMPLES = 512
_PROBE = "Zwölf kvswap-Tokens: 3.14 <s>[INST] def f(x):\n\treturn x ** 2  # 中文 ünïcödé"


def weights_hash(parts: ModelParts) -> str:
    """Hash over samples of every parameter and over the geometry of attention."""
    digest = hashlib.sha256(repr((parts.query_heads, parts.kv_heads, parts.head_dim, parts.scaling)).encode())
    digest.update(repr([part.layer_type for part in parts.layers]).encode())
    for name, tensor in parts.model.named_parameters():
        flat = tensor.detach().reshape(-1)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        for start in (0, max(0, flat.numel() // 2 - _SAMPLE), max(0, flat.numel() - _SAMPLE)):
            sample = flat[start : start + _SAMPLE]
            digest.update(sample.to(torch.float32).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def rope_hash(parts: ModelParts) -> str:
    """Hash of what positions mean: RoPE parameters, sliding window."""
    names = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "sliding_window")
    values = {name: getattr(parts.config, name, None) for name in names}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash over a probe text's tokens and samples of the vocabulary; empty without a tokenizer."""
    if tokenizer is None:
        return ""
    size = len(tokenizer)
    sampled = sorted({number * (size - 1) // (_VOCABULARY_SAMPLES - 1) for number in range(_VOCABULARY_SAMPLES)})
    values = [size, tokenizer.convert_ids_to_tokens(sampled), tokenizer(_PROBE, add_special_tokens=True)["input_ids"]]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]
