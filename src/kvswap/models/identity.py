"""Which model, tokenizer and positions something on disk belongs to, as hashes that change when tokens would.

There are two hashes of a model because files hold both: ``weights_hash`` for stored K, V, ``attention_fingerprint`` for
what was measured of a model. Parameters are sampled, so that a mapped file of many GiB is not read for it; that tells
models and fine-tunes apart, and is no proof against a change of single weights.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from kvswap.models.adapter import ModelParts

_SAMPLE = 64
_STRIDED = 1024
_VOCABULARY_SAMPLES = 512
_PROBE = "Zwölf kvswap-Tokens: 3.14 <s>[INST] def f(x):\n\treturn x ** 2  # 中文 ünïcödé"


def weights_hash(parts: ModelParts) -> str:
    """What stored K, V depend on: samples of every parameter, and the geometry of attention. 32 hex digits.

    Kept in every session's manifest, so its value must never change for a model.
    """
    digest = hashlib.sha256(repr((parts.query_heads, parts.kv_heads, parts.head_dim, parts.scaling)).encode())
    digest.update(repr([part.layer_type for part in parts.layers]).encode())
    for name, tensor in parts.model.named_parameters():
        flat = tensor.detach().reshape(-1)
        middle, last = (max(0, start) for start in (flat.numel() // 2 - _SAMPLE, flat.numel() - _SAMPLE))
        windows = [flat[start : start + _SAMPLE] for start in (0, middle, last)]
        _add(digest, f"{name} {tuple(tensor.shape)}", *windows)
    return digest.hexdigest()[:32]


def attention_fingerprint(parts: ModelParts) -> str:
    """What measurements depend on: the configuration, and samples of the first and last attention. 64 hex digits.

    Names the cached calibration, profile and tables of a model, and the model that a configuration was tuned for, so
    its value must never change either. Cheap: it touches two layers, where ``weights_hash`` touches all.
    """
    values = parts.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype"):  # where from and how loaded, not what it is
        values.pop(name, None)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    for part in (parts.offloaded[0], parts.offloaded[-1]):
        for name, tensor in part.attention.named_parameters():
            flat = tensor.detach().reshape(-1)
            _add(digest, name, flat[:: max(1, flat.numel() // _STRIDED)])
    return digest.hexdigest()


def _add(digest: Any, label: str, *samples: torch.Tensor) -> None:
    """Take a parameter's name and some of its elements, as float32, into the hash."""
    digest.update(label.encode())
    for sample in samples:
        digest.update(sample.to(torch.float32).cpu().numpy().tobytes())


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
