"""RoPE scaling of a GGUF file, which transformers drops when it reads one. Without it answers are wrong.

``gguf_model`` asks for it, and ``gguf`` when it converts a file. The scaling is written as keys of the header (linear,
YaRN) or as one factor for each frequency (Llama 3.1). What cannot be expressed as ``rope_parameters`` is refused.
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from kvswap.errors import ModelError
from kvswap.weights.gguf_file import GgufFile

_FACTORS = "rope_freqs.weight"
_SIGNS = (b".rope.scal", _FACTORS.encode(), b"rope_factors_long")
_HEADER_BYTES = 64 << 20
_WITHOUT_EFFECT = {"finetuned", "yarn_ext_factor", "original_context_length", "type", "factor"}
_BETAS = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
_ONE = {"attn_factor", "yarn_attn_factor"}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def mentions_scaling(file: Path) -> bool:
    """Whether the header has anything about RoPE scaling. Needs no package."""
    with file.open("rb") as data, mmap.mmap(data.fileno(), 0, access=mmap.ACCESS_READ) as header:
        return any(header.find(sign, 0, _HEADER_BYTES) >= 0 for sign in _SIGNS)


def rope_scaling(file: GgufFile, head_dim: int, theta: float) -> dict[str, Any]:
    """Keys of ``rope_parameters`` for the scaling of a file; empty without any. Raises ModelError for other kinds."""
    prefix = f"{file.architecture}.rope.scaling."
    stated = {key.removeprefix(prefix): value for key, value in file.metadata.items() if prefix in key}
    if (old := file.metadata.get(f"{file.architecture}.rope.scale_linear")) is not None:
        stated = {"type": "linear", "factor": old} | stated
    tensors = [tensor for name, tensor in file.tensors.items() if name.startswith(("rope_f", "blk.0.rope_f"))]
    if any("rope_factors" in tensor.name for tensor in tensors):
        raise _unsupported(file.path, "long and short factors")
    if tensors:
        factors = np.frombuffer(tensors[0].data.numpy().tobytes(), np.float32).astype(np.float64)
        return _llama3(file.path, factors, head_dim, theta)
    return _stated(file.path, stated)


def _stated(file: Path, stated: dict[str, Any]) -> dict[str, Any]:
    kind, factor = stated.get("type", "none"), float(stated.get("factor", 1.0))
    if kind == "none" or factor in (0.0, 1.0):
        return {}
    if kind not in ("linear", "yarn"):
        raise _unsupported(file, f"type {kind!r}")
    other = set(stated) - _WITHOUT_EFFECT - set(_BETAS) - {key for key in _ONE if stated.get(key) == 1.0}
    if other:
        raise _unsupported(file, ", ".join(sorted(other)))
    found: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        found |= {name: float(stated[key]) for key, name in _BETAS.items() if key in stated}
        if "original_context_length" in stated:
            found["original_max_position_embeddings"] = int(stated["original_context_length"])
    return found


def _llama3(file: Path, factors: np.ndarray[Any, Any], head_dim: int, theta: float) -> dict[str, Any]:
    """The parameters whose factors are those of the file: the file has only the outcome."""
    if np.all(factors == 1):
        return {}
    factor = float(factors.max())
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = _LLAMA3["original_max_position_embeddings"] * frequency / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if expected.shape != factors.shape or not np.allclose(expected, factors, rtol=1e-3):
        raise _unsupported(file, "factors of its own")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _unsupported(file: Path, what: str) -> ModelError:
    return ModelError(
        f"model {file}: its RoPE scaling cannot be converted: {what}", hint="give the model directory it was made from"
    )
