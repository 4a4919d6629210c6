"""Bases of kvswap's sketch, kept in the cache folder beside the calibration that they are made from.

Making them decomposes a D x D matrix for each layer, at every attach. With D = 1024, as in Llama-3.1-8B, that takes
0.8 s of processor time a layer; reading them takes a tenth of a second for all. A file that is not as it was written,
belongs to other statistics, or cannot be written does not count. One thread.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvswap.disk.atomic import atomic_file
from kvswap.disk.folders import calibration_folder
from kvswap.errors import StorageError
from kvswap.models.adapter import ModelParts
from kvswap.models.identity import attention_fingerprint
from kvswap.selection.basis import TRANSFORM, TRANSFORM_ROWS, Basis, KeyCovariance
from kvswap.selection.method import MakeBasis, made_bases

_log = logging.getLogger("kvswap")
LEAST_ELEMENTS = 512
"""Bases of smaller keys are made as fast as they are read."""
_VERSION = "1"


def kept_bases(
    parts: ModelParts, statistics: Sequence[KeyCovariance], rank: int, bits: int, make: MakeBasis
) -> list[Basis]:
    """What ``made_bases`` gives, bit by bit, from the cache folder or made now and kept there."""
    elements = parts.kv_heads * parts.head_dim
    if elements < LEAST_ELEMENTS:
        return made_bases(statistics, rank, bits, make)
    identity = {"version": _VERSION, "statistics": _digest(statistics), "rank": str(rank), "bits": str(bits)}
    try:
        path = calibration_folder() / f"{attention_fingerprint(parts)[:24]}-bases-{rank}x{bits}.safetensors"
    except StorageError:
        return made_bases(statistics, rank, bits, make)
    found = _stored(path, identity, len(statistics), (2 * elements, rank))
    if found is None:
        found = made_bases(statistics, rank, bits, make)
        _store(path, identity, found)
    return found


def _digest(statistics: Sequence[KeyCovariance]) -> str:
    """A hash of all moments."""
    digest = xxhash.xxh3_128()
    for each in statistics:
        digest.update(repr((each.count, each.query_count)).encode())
        for tensor in (each.matrix, each.total, each.queries):
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _stored(path: Path, identity: dict[str, str], layers: int, shape: tuple[int, int]) -> list[Basis] | None:
    """Bases from a file; None where there are none that can be used."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if json.loads((file.metadata() or {}).get("kvswap", "null")) != identity:
                return None
            pairs = [(file.get_tensor(f"{layer}"), file.get_tensor(f"rows{layer}")) for layer in range(layers)]
    except (SafetensorError, OSError, ValueError) as error:
        _log.debug("kept bases are damaged: %s", error)
        return None
    for matrix, rows in pairs:
        if matrix.shape != shape or matrix.dtype != torch.float16 or not bool(matrix.isfinite().all()):
            return None
        if rows.shape != (TRANSFORM_ROWS, shape[1]) or rows.dtype != torch.float32 or not bool(rows.isfinite().all()):
            return None
    return [Basis(matrix, TRANSFORM, rows) for matrix, rows in pairs]


def _store(path: Path, identity: dict[str, str], bases: Sequence[Basis]) -> None:
    """Keep bases; where that cannot be, they are made again the next time."""
    tensors = {f"{layer}": basis.matrix for layer, basis in enumerate(bases)}
    tensors |= {f"rows{layer}": basis.rows for layer, basis in enumerate(bases) if basis.rows is not None}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:  # two processes may attach at once
            save_file(tensors, file.name, metadata={"kvswap": json.dumps(identity)})
    except (OSError, SafetensorError) as error:
        _log.debug("bases are not kept in %s: %s", path, error)
