"""The basis of the sketch: which directions of a layer's keys matter, learned once per model and cached.

The model reads Python's own language reference (the calibration half of ``core.corpus``, never what is evaluated)
layer-major; each layer's keys after RoPE are added to a D x D covariance and dropped. Without a tokenizer nothing can
be read, and whole-key codes are used instead.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvswap.core.corpus import calibration_topics
from kvswap.core.layer_major import LayerMajorCache, Progress, stock_layers
from kvswap.core.prefill import chunk_spans
from kvswap.disk.atomic import atomic_file
from kvswap.models.adapter import LayerParts, ModelParts
from kvswap.selection.basis import KeyCovariance, load_bases, save_bases

CALIBRATION_TOKENS = 16_384
SEQUENCE_TOKENS = 8_192
VERSION = "3"


class CalibrationCache(LayerMajorCache):
    """Takes the keys and queries of every offloaded layer into its moments and forgets them."""

    def __init__(self, parts: ModelParts, implementation: str, covariances: list[KeyCovariance], **kwargs: Any) -> None:
        super().__init__(parts, implementation, stock_layers(parts), **kwargs)
        self._covariances = covariances

    def attention(
        self,
        part: LayerParts,
        stock: Callable[..., Any],
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Count the layer's queries on the way."""
        if part.order is not None:
            self._covariances[part.order].add_queries(query[0])
        return super().attention(part, stock, query, keys, values, mask, kwargs)

    def leave(self, part: LayerParts) -> None:
        """Count the layer's keys, then drop them."""
        if part.order is not None:
            layer = self.layers[part.index]
            self._covariances[part.order].add(layer.keys[0].transpose(0, 1))
            layer.keys, layer.values = layer.keys[:, :, :0].clone(), layer.values[:, :, :0].clone()


def calibrate(
    parts: ModelParts,
    implementation: str,
    tokenizer: Any,
    folder: Path,
    *,
    run: Callable[[torch.Tensor, LayerMajorCache], None],
    chunk_tokens: int,
    on_progress: Progress | None,
) -> list[KeyCovariance]:
    """Statistics of the keys of every offloaded layer, from the cache folder or measured now.

    ``run(ids, cache)`` takes token ids ``[1, T]`` through the attached model.
    """
    identity = {"model": fingerprint(parts), "version": VERSION, "tokens": str(CALIBRATION_TOKENS)}
    path = folder / f"{identity['model'][:24]}-{VERSION}.safetensors"
    found = load_bases(path, identity)
    if isinstance(found, dict):
        return [found[part.index] for part in parts.offloaded]
    limit = int(getattr(parts.config, "max_position_embeddings", SEQUENCE_TOKENS))
    ids = tokenizer("\n\n".join(text for _, text in calibration_topics()), add_special_tokens=False)["input_ids"]
    ids = ids[:CALIBRATION_TOKENS]
    covariances = [KeyCovariance(parts.kv_heads, parts.head_dim) for _ in parts.offloaded]
    spans = list(chunk_spans(len(ids), min(SEQUENCE_TOKENS, limit)))
    for number, (start, stop) in enumerate(spans):

        def report(_: str, done: int, total: int, number: int = number) -> None:
            if on_progress is not None:
                on_progress("calibrate", number * total + done, len(spans) * total)

        cache = CalibrationCache(parts, implementation, covariances, chunk_tokens=chunk_tokens, on_progress=report)
        run(torch.tensor([ids[start:stop]], device=parts.device), cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:  # two processes may calibrate at once
        save_bases(file.name, {part.index: covariances[part.order or 0] for part in parts.offloaded}, identity)
    return covariances


def fingerprint(parts: ModelParts) -> str:
    """Identity of a model for calibration: its key and query projections' look and its configuration."""
    values = parts.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype"):  # where from and how loaded, not what it is
        values.pop(name, None)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    for part in (parts.offloaded[0], parts.offloaded[-1]):
        for name, tensor in part.attention.named_parameters():
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 1024)].float().cpu()
            digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()
