"""Loads the model that a name stands for: a local directory, a .gguf file, a hub id or the demo's model.

The command line and ``kvswap.load`` call ``load_model`` before a cache is attached. The model computes with sdpa
attention, is in evaluation mode and needs no gradients. Weights are mapped from the file unless ``mmap=False``. One
thread.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from kvswap.disk.folders import user_path
from kvswap.errors import ConfigError, ModelError
from kvswap.memory.available import available_bytes
from kvswap.models.checkpoint import WHERE, Checkpoint, quantisation
from kvswap.models.checkpoint_files import stored_bytes
from kvswap.models.fitting import WeightNeeds, check_that_it_fits
from kvswap.models.gguf import BUNDLED, bundled_file, bundled_model, check_architecture, converted
from kvswap.models.gguf_model import check_metadata, check_shapes, load_packed, runs_as_it_is, unpacked_bytes
from kvswap.models.hub import has_cached, look_like_path, problem_with
from kvswap.models.mapped import watch
from kvswap.models.packed_checkpoint import AS_IT_IS, PACKINGS, load_packed_checkpoint
from kvswap.native.library import available
from kvswap.native.processor import has_bfloat16
from kvswap.weights.gguf_file import GgufFile
from kvswap.weights.modules import unpack_modules

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("auto", "float", *PACKINGS)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and its tokenizer.

    ``name`` is what the user called it, ``weights`` which weights were asked for, ``file`` what they are mapped from.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    file: GgufFile | None = None
    weights: str = "auto"

    def check_weights(self) -> None:
        """Raise ModelError where the file that the weights are mapped from was changed."""
        if self.file is not None:
            self.file.check_unchanged()

    @property
    def short_name(self) -> str:
        """The name for files that others read: of a local folder or file only the last part."""
        path = user_path(self.name)
        return path.resolve().name if path.exists() else self.name


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    weights: str = "auto",
    mmap: bool = True,
    on_notice: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Parameters
    ----------
    name
        Local directory, ``.gguf`` file (any part of one that is split), hub id, or ``smollm2-135m`` from the installed
        package that carries it.
    dtype
        ``"auto"``: the checkpoint's, but float32 on a CPU without bfloat16 instructions when that has 16 bits.
    weights
        ``"auto"``: as the file has them. A GGUF file is multiplied packed where its architecture and type are known.
        ``"float"``: a GGUF file is converted to float32 once, into the cache folder. ``"q8"``, ``"q4"``: the matrices
        of a checkpoint are packed once, to Q8_0 or Q4_0, into a file in the cache folder; on a CPU, in float32.
    mmap
        False copies the weights into anonymous memory.
    on_notice
        Called with a sentence where something takes long or differs from what was asked for.

    Raises
    ------
    ModelError, ConfigError, StorageError, MemoryBudgetError
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: got {dtype!r}", hint=f"use one of {', '.join(DTYPES)}")
    if weights not in WEIGHTS:
        raise ConfigError(f"weights: got {weights!r}", hint=f"use one of {', '.join(WEIGHTS)}")
    notice = _each_once(on_notice or (lambda text: None))
    file = _gguf_file(name)
    if weights in PACKINGS:
        _check_packing(name, file, dtype, weights)
    if file is not None:
        check_architecture(file)
        check_metadata(file)
        if _stays_packed(file, dtype, weights, notice):
            return _load_file(name, file, weights, mmap, notice)
        if runs_as_it_is(file):
            check_shapes(file)  # transformers would make a model of whatever sizes the metadata has
    source, local = _source(name, notice)
    progress = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        loaded = _load(name, source, local, dtype, weights, mmap, notice)
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress:
            transformers_logging.enable_progress_bar()
    return _placed(loaded, mmap)


def _placed(loaded: LoadedModel, mmap: bool) -> LoadedModel:
    """A model on its device, ready to compute; its weights are copied, or watched where they are mapped from a file."""
    model = loaded.model.eval().requires_grad_(False)
    if torch.cuda.is_available():
        model.to("cuda")
    elif not mmap:
        copy_weights(model)
    elif loaded.file is not None:
        watch(model, loaded.file.mapped)
        return loaded
    loaded.check_weights()
    return replace(loaded, file=None)


def _each_once(notice: Callable[[str], None]) -> Callable[[str], None]:
    """Say nothing twice: a checkpoint that is packed is made into a model more than once."""
    said = set[str]()

    def once(text: str) -> None:
        if text not in said:
            said.add(text)
            notice(text)

    return once


def _gguf_file(name: str) -> GgufFile | None:
    """The file that a name stands for, opened and checked; None for other kinds of models."""
    path = user_path(name)
    if name == BUNDLED:
        path = bundled_file()
    return GgufFile(path) if path.is_file() else None


def _stays_packed(file: GgufFile, dtype: str, weights: str, notice: Callable[[str], None]) -> bool:
    """Whether a file runs as it is, else it is converted; says why where that was not asked for."""
    if weights == "float" or dtype not in ("auto", "float32"):
        return False
    if not runs_as_it_is(file):
        notice(f"model {file.path}: architecture {file.architecture!r} does not run packed, so it is converted")
        return False
    if not available():
        notice(
            f"model {file.path}: nothing was compiled here that multiplies packed weights, so it is converted, and "
            "runs slower"
        )
        return False
    return True


def _load_file(name: str, file: GgufFile, weights: str, mmap: bool, notice: Callable[[str], None]) -> LoadedModel:
    """A model whose weights stay packed; on a GPU, where nothing multiplies them, they are unpacked."""
    check_that_it_fits(name, _packed_needs(file), mmap=mmap, free_bytes=available_bytes(), notice=notice)
    model, tokenizer = load_packed(file, notice)
    if torch.cuda.is_available():
        notice(f"model {name}: its weights are unpacked to bfloat16 for the GPU")
        unpack_modules(model, torch.bfloat16)
        model.to(torch.bfloat16)
    return _placed(LoadedModel(model, tokenizer, name, file, weights), mmap)


def _check_packing(name: str, file: GgufFile | None, dtype: str, weights: str) -> None:
    """Raise ConfigError where weights cannot be packed, whatever the checkpoint is."""
    if file is not None:
        raise ConfigError(
            f"weights {weights}: model {name} is a .gguf file, whose weights are packed already",
            hint="leave it out, and give a .gguf file of the type that you want",
        )
    if dtype not in ("auto", "float32"):
        raise ConfigError(
            f"weights {weights} with dtype {dtype}: packed weights compute in float32", hint="leave one of them out"
        )
    if torch.cuda.is_available():
        raise ConfigError(
            f"weights {weights}: nothing multiplies packed weights on a GPU",
            hint="leave it out, or hide the GPU with CUDA_VISIBLE_DEVICES=''",
        )
    if not available():
        raise ConfigError(
            f"weights {weights}: nothing was compiled here that multiplies packed weights",
            hint="leave it out, or install kvswap again where there is a C compiler",
        )


def _packed_needs(file: GgufFile) -> WeightNeeds:
    unpacked = {each.name: unpacked_bytes(each) for each in file.tensors.values()}
    return WeightNeeds(
        file_bytes=sum(each.data.nbytes for each in file.tensors.values() if not unpacked[each.name]),
        made_bytes=sum(unpacked.values()),
        why="when they are unpacked",
        smaller="take a file of a smaller type, such as Q4_K_M or Q8_0",
    )


def quieten() -> None:
    """Let transformers log only errors, for programs such as the command line that own their output."""
    transformers_logging.set_verbosity_error()


def _source(name: str, notice: Callable[[str], None]) -> tuple[str, bool]:
    """What transformers should load, and whether only from local files."""
    if name == BUNDLED:
        return str(bundled_model(notice)), True
    path = user_path(name)
    if path.is_dir():
        _check_folder(path)
        return str(path), True
    if path.is_file():
        return str(converted(path, notice)), True
    if look_like_path(name):
        raise ModelError(f"model {name}: no such file or directory", hint=WHERE)
    problem = problem_with(name)
    if problem is None:
        return name, False
    if problem.final or not has_cached(name):
        raise ModelError(f"model {name}: {problem.text}", hint=problem.hint or WHERE)
    notice(f"model {name}: {problem.text}; the copy in the local cache is used")
    return name, True


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        gguf = sorted(path.glob("*.gguf"))
        hint = f"give the file itself: {gguf[0]}" if gguf else "give a directory that save_pretrained wrote"
        raise ModelError(f"model {path}: the directory has no config.json", hint=hint)
    settings = path / "generation_config.json"
    try:  # transformers would go on without it, and without its end tokens
        if settings.exists():
            json.loads(settings.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"model {path}: {settings.name} is not JSON: {error}", hint="fetch it again") from error


def _load(
    name: str, source: str, local: bool, dtype: str, weights: str, mmap: bool, notice: Callable[[str], None]
) -> LoadedModel:
    """A checkpoint, as it is or packed."""
    checkpoint = Checkpoint(name, source, local, notice)
    config, tokenizer, generation = checkpoint.settings()
    stated = getattr(config.get_text_config(), "dtype", None) or config.dtype
    if weights not in PACKINGS:
        chosen = _choose_dtype(dtype, stated)
        _check_floats(name, Path(source), chosen, mmap, notice)
        return LoadedModel(checkpoint.model(config, chosen), tokenizer, name, weights=weights)
    if (kind := quantisation(config)) is not None:
        raise ModelError(f"model {name}: its weights are quantised already ({kind})", hint=AS_IT_IS)
    read = partial(checkpoint.model, config, stated or "auto")
    model, file = load_packed_checkpoint(name, source, config, weights, read, notice)
    model.generation_config = generation or GenerationConfig.from_model_config(config)
    needs = replace(_packed_needs(file), smaller="use --weights q4" if weights == "q8" else "use a smaller model")
    check_that_it_fits(name, needs, mmap=mmap, free_bytes=available_bytes(), notice=notice)
    return LoadedModel(model, tokenizer, name, file, weights)


def _check_floats(name: str, folder: Path, dtype: Any, mmap: bool, notice: Callable[[str], None]) -> None:
    """Raise MemoryBudgetError where the weights of a local folder cannot fit into the memory of this machine."""
    if torch.cuda.is_available() or not folder.is_dir():
        return
    if (found := stored_bytes(folder, dtype if isinstance(dtype, torch.dtype) else None)) is None:
        return
    needs = WeightNeeds(
        file_bytes=found[0],
        made_bytes=found[1],
        why=f"when they are converted to {str(dtype).removeprefix('torch.')}",
        smaller="use --weights q8 or q4",
    )
    check_that_it_fits(name, needs, mmap=mmap, free_bytes=available_bytes(), notice=notice)


def _choose_dtype(requested: str, stated: Any) -> Any:
    """The dtype to load in: ``"auto"`` means as in the checkpoint, whose configuration states ``stated``."""
    if requested != "auto":
        return getattr(torch, requested)
    if stated is not None and stated.itemsize != 2:
        return stated
    return "auto" if torch.cuda.is_available() or has_bfloat16() else torch.float32


def copy_weights(model: torch.nn.Module) -> None:
    """Copy every weight from the mapped file into memory, one by one; tied weights stay tied."""
    copies: dict[tuple[int, torch.Size, tuple[int, ...]], torch.Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in copies or not tensor.numel():
            copies[key] = tensor.data.clone()
        tensor.data = copies[key]
