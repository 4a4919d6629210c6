"""Checkpoints whose matrices are packed once, into a GGUF file in the cache folder, and then mapped from there.

``loading`` calls this for ``weights="q8"`` and ``"q4"``. Tensors of the file have the names of the model's parameters.
Matrices of linear layers and embeddings are Q8_0; with ``q4`` those of the decoder layers are Q4_0. All else is F32.
The file's name has the identity of the checkpoint, so that a changed one is packed anew. A file is there only whole,
and only after it computed what the same weights compute unpacked (``packing_check``). One thread.
"""

from __future__ import annotations

import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from kvswap.disk.atomic import atomic_file, remove_leftovers
from kvswap.disk.files import free_bytes
from kvswap.disk.folders import models_folder, user_path
from kvswap.errors import ModelError, StorageError
from kvswap.models.checkpoint_files import checkpoint_identity
from kvswap.models.empty_model import check_filled, empty_model, place_packed
from kvswap.models.loading_info import some_of
from kvswap.models.packing_check import check_products
from kvswap.units import format_bytes
from kvswap.weights.gguf_file import TYPES, GgufFile, Tensor
from kvswap.weights.modules import PANEL_BYTES, dequantise

PACKINGS = ("q8", "q4")
AS_IT_IS = "use --weights auto, which takes the checkpoint as it is"
_F32, _Q4_0, _Q8_0 = 0, 2, 8
_ARCHITECTURE = "kvswap-packed"
_WRITTEN_S = "kvswap.written_s"
_ALIGNMENT_BYTES = 32
_MAX_DIMENSIONS = 4
_PROGRESS_S = 15.0
_WRONG_CONFIGURATION = (ImportError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


@dataclass(frozen=True, slots=True)
class Planned:
    """What a tensor is in the file: its type's number, and its shape."""

    kind: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        _, block, block_bytes = TYPES[self.kind]
        return prod(self.shape) // block * block_bytes


Plan = dict[str, Planned]


def load_packed_checkpoint(
    name: str,
    source: str,
    config: Any,
    weights: str,
    read: Callable[[], PreTrainedModel],
    notice: Callable[[str], None],
) -> tuple[PreTrainedModel, GgufFile]:
    """The model with packed weights, and their file, which is made now or was made earlier.

    Parameters
    ----------
    source
        The folder or hub id that transformers loads; ``name`` is what the user called it.
    weights
        One of ``PACKINGS``.
    read
        Loads the checkpoint in its own dtype, mapped. Called only where the file has to be made.

    Raises
    ------
    ModelError, StorageError
    """
    remove_leftovers(models_folder())
    try:
        model = empty_model(config, notice)
    except _WRONG_CONFIGURATION as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"model {name}: its configuration makes no model: {text}", hint="fetch it again") from error
    plan = plan_packing(name, model, weights)
    stem = re.sub(r"[^\w.-]+", "-", user_path(name).resolve().name if Path(source).is_dir() else name)
    path = models_folder() / f"{stem}-{checkpoint_identity(source, config)}-{weights}.gguf"
    file = _opened(path, plan, notice)
    if file is None:
        _pack(name, path, plan, read, lambda: empty_model(config, lambda text: None), notice)
        file = GgufFile(path)
    fill(model, file, plan)
    # ``attention_fingerprint`` includes it: results of these weights do not hold for others, also where no matrix of
    # attention could be packed.
    model.config.get_text_config().weights_packed_to = weights
    return model, file


def plan_packing(name: str, model: PreTrainedModel, weights: str) -> Plan:
    """What each parameter of a model becomes, by its first name. Raises ModelError where one cannot be kept."""
    decoder_layers = getattr(model.get_decoder(), "layers", None) or []
    in_layers = {id(module) for layer in decoder_layers for module in layer.modules()}
    plan = {}
    for parameter, owners in _owners(model):
        modules, shape = [model.get_submodule(path) for path, _ in owners], tuple(parameter.shape)
        kind = _F32
        if all(map(_packs, modules)) and {ending for _, ending in owners} == {"weight"} and shape[1] % 32 == 0:
            in_layer = all(type(module) is nn.Linear and id(module) in in_layers for module in modules)
            kind = _Q4_0 if weights == "q4" and in_layer else _Q8_0
        plan[".".join(filter(None, owners[0]))] = Planned(kind, _file_shape(shape))
    state, parameters = model.state_dict(), {each for each, _ in model.named_parameters(remove_duplicate=False)}
    for each in sorted(set(state) - parameters):  # buffers that the checkpoint has
        if not state[each].is_floating_point():
            raise ModelError(f"model {name}: {each} does not hold floats, so it cannot be packed", hint=AS_IT_IS)
        plan[each] = Planned(_F32, _file_shape(tuple(state[each].shape)))
    return plan


def fill(model: PreTrainedModel, file: GgufFile, plan: Plan) -> None:
    """Put the tensors of a packed file into an empty model. Tied ones stay tied. Raises ModelError."""
    owners = {".".join(filter(None, each[0])): each for _, each in _owners(model)}
    packed = {name for name in plan if plan[name].kind != _F32}
    for name in plan.keys() - packed:
        if name not in owners:
            _set(model, name, _floats(file.tensors[name], model.get_buffer(name).shape))
            continue
        path, ending = owners[name][0]
        shape = model.get_submodule(path)._parameters[ending].shape
        values = nn.Parameter(_floats(file.tensors[name], shape), requires_grad=False)
        for each in owners[name]:
            _set(model, ".".join(filter(None, each)), values)
    for name in packed:  # after all others, which are the biases
        tensor = file.tensors[name]
        weight = nn.Parameter(tensor.data, requires_grad=False)
        for path, _ in owners[name]:
            # Inputs that count with 8 bits would cost more than weights of 8 bits do: half of the KL with SmolLM2-135M.
            bias, fine = getattr(model.get_submodule(path), "bias", None), tensor.type == _Q8_0
            place_packed(model, path, weight, tensor.type, bias, columns=tensor.shape[1], fine=fine)
    if not any(each.is_floating_point() for each in model.parameters()):
        # transformers takes a model's dtype from them, and a family without weights in its norms has none left
        model.register_parameter("packed_dtype", nn.Parameter(torch.empty(0), requires_grad=False))
    check_filled(model, AS_IT_IS)


def _owners(model: PreTrainedModel) -> Iterator[tuple[nn.Parameter, list[tuple[str, str]]]]:
    """Every parameter once, with the modules that have it: their paths, and its names there."""
    found: dict[int, tuple[nn.Parameter, list[tuple[str, str]]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, ending = name.rpartition(".")
        found.setdefault(id(parameter), (parameter, []))[1].append((path, ending))
    yield from found.values()


def _packs(module: nn.Module) -> bool:
    """Whether a module is one that a packed one replaces; ``packing_check`` finds what else a subclass does."""
    return type(module) is nn.Linear or isinstance(module, nn.Embedding)


def _file_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape as the format can have it: up to four dimensions."""
    if len(shape) <= _MAX_DIMENSIONS:
        return shape
    return (prod(shape[: 1 - _MAX_DIMENSIONS]), *shape[1 - _MAX_DIMENSIONS :])


def _set(model: PreTrainedModel, name: str, values: torch.Tensor) -> None:
    path, _, ending = name.rpartition(".")
    setattr(model.get_submodule(path), ending, values)


def _floats(tensor: Tensor, shape: torch.Size) -> torch.Tensor:
    """A float32 tensor: copied where it is a vector, else mapped."""
    values = dequantise(tensor.data, tensor.type).view(shape)
    return values.clone() if len(shape) < 2 else values


def _opened(path: Path, plan: Plan, notice: Callable[[str], None]) -> GgufFile | None:
    """The packed file, or None where there is none or it is not as it was written."""
    if not path.is_file():
        return None
    try:
        file = GgufFile(path)
        _check_file(file, plan)
    except ModelError as error:
        notice(f"{error.message}; the weights are packed anew")
        return None
    return file


def _check_file(file: GgufFile, plan: Plan) -> None:
    """Raise ModelError where a file does not have what was planned, or was written to since it was made."""
    found = {name: Planned(tensor.type, tensor.shape) for name, tensor in file.tensors.items()}
    if found != plan:
        raise ModelError(f"model {file.path}: its tensors are not those of this model")
    if file.metadata.get(_WRITTEN_S) != file.path.stat().st_mtime_ns / 1e9:
        raise ModelError(f"model {file.path}: the file was changed since it was made")


def _pack(
    name: str,
    path: Path,
    plan: Plan,
    read: Callable[[], PreTrainedModel],
    empty: Callable[[], PreTrainedModel],
    notice: Callable[[str], None],
) -> None:
    """Make the packed file of a checkpoint. Raises ModelError, StorageError."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"model {name}: the package gguf packs weights", hint="run: pip install 'kvswap[gguf]'")
    size_bytes, checkpoint = sum(each.nbytes for each in plan.values()), read()
    _check_size(name, plan, checkpoint)
    notice(f"packing the weights of {name}, once, into {path} ({format_bytes(size_bytes)})")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (free := free_bytes(path.parent)) < size_bytes:
            raise StorageError(
                f"{path} needs {format_bytes(size_bytes)}, {format_bytes(free)} of disk are free",
                hint="free some space, or move the cache folder with KVSWAP_HOME",
            )
        with atomic_file(path) as file:
            _write(file, plan, checkpoint.state_dict(), notice)
            del checkpoint
            written = GgufFile(Path(file.name))
            check_products(name, empty, lambda model: fill(model, written, plan))
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror or error}",
            hint=f"free space there ({format_bytes(size_bytes)} are needed), or move the cache folder with KVSWAP_HOME",
        ) from error
    notice(f"packed: {path} has {format_bytes(path.stat().st_size)}")


def _check_size(name: str, plan: Plan, checkpoint: PreTrainedModel) -> None:
    """Raise ModelError where packing makes nothing smaller, as with experts that are no linear layers."""
    packed_bytes = sum(each.nbytes for each in plan.values())
    now_bytes = sum(each.nbytes for each in checkpoint.parameters())
    if packed_bytes >= now_bytes:
        others = sorted((each for each in plan if plan[each].kind == _F32), key=lambda each: -plan[each].nbytes)
        raise ModelError(
            f"model {name}: packed, its weights would take {format_bytes(packed_bytes)}, and they take "
            f"{format_bytes(now_bytes)} now: these are in no linear layers of whole blocks: {some_of(others)}",
            hint=AS_IT_IS,
        )


def _write(file: IO[bytes], plan: Plan, tensors: dict[str, torch.Tensor], notice: Callable[[str], None]) -> None:
    """Write the header by the package ``gguf``, then one tensor after the other, panel by panel."""
    from gguf import GGMLQuantizationType, GGUFWriter

    # The file gets this time, so that a later change of it shows: two seconds are the coarsest clock of a file system.
    written_s = int(time.time()) // 2 * 2
    writer = GGUFWriter(file.name, _ARCHITECTURE)
    writer.add_uint64(_WRITTEN_S, written_s)
    for name, each in plan.items():
        kind = GGMLQuantizationType(each.kind)
        writer.add_tensor_info(name, each.shape, np.dtype(np.float32), each.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    file.seek(0, os.SEEK_END)
    done_bytes, all_bytes, said_s = 0, sum(each.nbytes for each in plan.values()), time.monotonic()
    for name, each in plan.items():
        file.write(bytes(-file.tell() % _ALIGNMENT_BYTES))
        for panel in _panels(tensors[name], each.kind):
            file.write(panel)
            done_bytes += panel.nbytes
            if time.monotonic() - said_s > _PROGRESS_S:
                said_s = time.monotonic()
                notice(f"packed {format_bytes(done_bytes)} of {format_bytes(all_bytes)}")
    file.flush()
    os.fsync(file.fileno())
    os.utime(file.name, (written_s, written_s))


def _panels(tensor: torch.Tensor, kind: int) -> Iterator[memoryview]:
    """The bytes of a tensor in the file, some rows at a time."""
    from gguf import GGMLQuantizationType, quantize

    rows = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    step = max(1, PANEL_BYTES // (4 * rows.shape[1]))
    for first in range(0, len(rows), step):
        values = np.ascontiguousarray(rows[first : first + step].float().numpy())
        packed = values if kind == _F32 else quantize(values, GGMLQuantizationType(kind))
        yield np.ascontiguousarray(packed).data.cast("B")
