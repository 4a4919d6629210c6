"""Calibration: statistics of a model's keys and queries, measured once for each model and cached.

The sketch's basis is made from them. The model reads Python's own language reference, the calibration half of
``core/corpus.py``, layer by layer. Each layer's keys after RoPE are added to a D x D covariance and dropped. Without a
tokenizer nothing can be read, and the sketch holds codes of whole keys instead.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvswap.core.corpus import calibration_topics
from kvswap.core.layer_major import AttentionInput, LayerMajorCache, Progress, stock_layers
from kvswap.core.prefill import chunk_spans
from kvswap.disk.atomic import atomic_file
from kvswap.disk.folders import VARIABLE, calibration_folder
from kvswap.errors import StorageError
from kvswap.models.adapter import LayerParts, ModelParts
from kvswap.models.identity import attention_fingerprint
from kvswap.selection.basis import KeyCovariance

CALIBRATION_TOKENS = 16_384
SEQUENCE_TOKENS = 8_192
VERSION = "3"

log = logging.getLogger("kvswap")


class CalibrationCache(LayerMajorCache):
    """Takes the keys and queries of every offloaded layer into its moments and forgets them."""

    def __init__(self, parts: ModelParts, implementation: str, covariances: list[KeyCovariance], **kwargs: Any) -> None:
        super().__init__(parts, implementation, stock_layers(parts), **kwargs)
        self._covariances = covariances

    def attention(self, given: AttentionInput) -> torch.Tensor:
        """Count the layer's queries on the way."""
        if given.part.order is not None:
            self._covariances[given.part.order].add_queries(given.query[0])
        return super().attention(given)

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
    *,
    run: Callable[[torch.Tensor, LayerMajorCache], None],
    chunk_tokens: int,
    on_progress: Progress | None,
    on_notice: Callable[[str], None] | None = None,
) -> list[KeyCovariance]:
    """Statistics of the keys of every offloaded layer, from the cache folder or measured now.

    ``run(ids, cache)`` takes token ids ``[1, T]`` through the attached model. Where the cache folder cannot be written,
    ``on_notice`` gets a sentence about it, and the next run measures again.
    """
    found = _stored(_identity(parts))
    if found is not None:
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
    problem = store_statistics(parts, covariances)
    if problem:
        log.debug("calibration is not kept: %s", problem)
        if on_notice is not None:
            on_notice(f"the calibration cannot be stored, so the next run measures it again: {problem}")
    return covariances


def _identity(parts: ModelParts) -> dict[str, str]:
    """What statistics belong to."""
    return {"model": attention_fingerprint(parts), "version": VERSION, "tokens": str(CALIBRATION_TOKENS)}


def _path(identity: dict[str, str]) -> Path:
    """Where the statistics of a model are kept. Raises StorageError."""
    return calibration_folder() / f"{identity['model'][:24]}-{VERSION}.safetensors"


def _stored(identity: dict[str, str]) -> dict[int, KeyCovariance] | None:
    """Statistics by layer index from the cache folder, or None where none can be used."""
    try:
        found = load_statistics(_path(identity), identity)
    except StorageError as error:
        found = error.message
    if isinstance(found, str):
        log.debug("calibration is measured now: %s", found)
        return None
    return found


def store_statistics(parts: ModelParts, statistics: Sequence[KeyCovariance]) -> str:
    """Keep one entry for each offloaded layer in the cache folder; why that cannot be, or nothing."""
    identity, by_index = _identity(parts), {part.index: statistics[part.order or 0] for part in parts.offloaded}
    try:
        path = _path(identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:  # two processes may calibrate at once
            save_statistics(file.name, by_index, identity)
    except StorageError as error:
        return str(error)
    except (OSError, SafetensorError) as error:
        return f"{path}: {getattr(error, 'strerror', None) or error}; set {VARIABLE} to a folder of yours"
    return ""


def save_statistics(path: str | Path, statistics: dict[int, KeyCovariance], identity: dict[str, str]) -> None:
    """Write the statistics of a model's layers to a file. Raises OSError."""
    tensors = {}
    for index, each in statistics.items():
        tensors[f"{index}"] = (each.matrix / max(1, each.count)).float()
        tensors[f"m{index}"] = (each.total / max(1, each.count)).float()
        tensors[f"q{index}"] = (each.queries / max(1, each.query_count)).float()
    save_file(tensors, path, metadata={"kvswap": json.dumps(identity)})


def _sound(matrix: torch.Tensor, mean: torch.Tensor, queries: torch.Tensor) -> bool:
    """Whether tensors from a file can be the moments of one layer."""
    if matrix.ndim != 2 or queries.ndim != 3 or queries.shape[1] != queries.shape[2]:
        return False
    if tuple(matrix.shape) != (queries.shape[0] * queries.shape[1],) * 2:
        return False
    if mean.shape != matrix.shape[:1]:
        return False
    return all(bool(each.isfinite().all()) for each in (matrix, mean, queries))


def load_statistics(path: Path, identity: dict[str, str]) -> dict[int, KeyCovariance] | str:
    """Statistics by layer index, or the reason why the file cannot be used."""
    if not os.path.exists(path):  # unlike Path.exists, no error where a folder may not be read
        return "no calibration yet"
    try:
        with safe_open(path, framework="pt") as file:
            if json.loads((file.metadata() or {}).get("kvswap", "null")) != identity:
                return "calibration of another model or version"
            found = {}
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name.startswith(("m", "q")):
                    continue
                matrix, mean, queries = (file.get_tensor(f"{kind}{name}") for kind in ("", "m", "q"))
                if not _sound(matrix, mean, queries):
                    return f"calibration of layer {name} is damaged"
                covariance = found[int(name)] = KeyCovariance(*queries.shape[:2])
                covariance.matrix, covariance.total, covariance.queries = (
                    matrix.double(),
                    mean.double(),
                    queries.double(),
                )
                covariance.count = covariance.query_count = 1
            return found
    except (SafetensorError, OSError, ValueError) as error:
        return f"calibration file is damaged: {error}"
