"""Loads the model that a name stands for: a local directory, a .gguf file, a hub id or the demo's model.

The command line and ``kvswap.load`` call ``load_model`` before a cache is attached. The model computes with sdpa
attention, is in evaluation mode and needs no gradients. Weights are mapped from the file unless ``mmap=False``. One
thread.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from kvswap.disk.folders import user_path
from kvswap.errors import ConfigError, MemoryBudgetError, ModelError
from kvswap.memory.available import available_bytes
from kvswap.models.gguf import BUNDLED, bundled_file, bundled_model, check_architecture, converted
from kvswap.models.gguf_model import check_metadata, check_shapes, load_packed, runs_as_it_is, unpacked_bytes
from kvswap.models.hub import has_cached, look_like_path, problem_with
from kvswap.models.loading_info import check_weights, unused_weights
from kvswap.models.mapped import watch
from kvswap.native.library import available
from kvswap.native.processor import has_bfloat16
from kvswap.units import format_bytes
from kvswap.weights.gguf_file import GgufFile
from kvswap.weights.modules import unpack_modules

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("auto", "float")

_WHERE = f"give a local model directory, a .gguf file, a hub id such as org/model, or {BUNDLED}"
_CODE_OF_ITS_OWN = "trust_remote_code"  # the errors of transformers name the option that would run it
_WRONG_VALUES = (ValueError, KeyError, TypeError, AttributeError, RuntimeError, struct.error)
_DAMAGED = (ImportError, OSError, SafetensorError, *_WRONG_VALUES)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and its tokenizer; ``name`` is what the user called it, ``file`` what its weights are mapped from."""

    model: PreTrainedModel
    tokenizer: Any
    name: str
    file: GgufFile | None = None

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
        ``"float"``: a GGUF file is converted to float32 once, into the cache folder.
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
    notice = on_notice or (lambda text: None)
    file = _gguf_file(name)
    if file is not None:
        check_architecture(file)
        check_metadata(file)
        if _stays_packed(file, dtype, weights, notice):
            return _load_file(name, file, mmap, notice)
        if runs_as_it_is(file):
            check_shapes(file)  # transformers would make a model of whatever sizes the metadata has
    source, local = _source(name, notice)
    progress = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        model, tokenizer = _load(name, source, local, dtype, notice)
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress:
            transformers_logging.enable_progress_bar()
    model.eval().requires_grad_(False)
    if torch.cuda.is_available():
        model.to("cuda")
    elif not mmap:
        copy_weights(model)
    return LoadedModel(model, tokenizer, name)


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


def _load_file(name: str, file: GgufFile, mmap: bool, notice: Callable[[str], None]) -> LoadedModel:
    """A model whose weights stay packed; on a GPU, where nothing multiplies them, they are unpacked."""
    _check_that_it_fits(name, file, mmap, notice)
    model, tokenizer = load_packed(file, notice)
    model.eval().requires_grad_(False)
    if torch.cuda.is_available():
        notice(f"model {name}: its weights are unpacked to bfloat16 for the GPU")
        unpack_modules(model, torch.bfloat16)
        model.to("cuda", torch.bfloat16)
    elif not mmap:
        copy_weights(model)
    else:
        watch(model, file.mapped)
        return LoadedModel(model, tokenizer, name, file)
    file.check_unchanged()
    return LoadedModel(model, tokenizer, name)


def _check_that_it_fits(name: str, file: GgufFile, mmap: bool, notice: Callable[[str], None]) -> None:
    """Raise MemoryBudgetError where a packed model cannot fit; say so where it fits only as far as it is mapped."""
    unpacked = {each.name: unpacked_bytes(each) for each in file.tensors.values()}
    anonymous_bytes = sum(unpacked.values())
    file_bytes = sum(each.data.nbytes for each in file.tensors.values() if not unpacked[each.name])
    free_bytes, free = (found := available_bytes()), format_bytes(found)
    if not mmap and anonymous_bytes + file_bytes > free_bytes:
        raise MemoryBudgetError(
            f"model {name}: its weights take {format_bytes(anonymous_bytes + file_bytes)}, {free} of memory are free",
            hint="leave --no-mmap out, close other programs, or take a file of a smaller type",
        )
    if anonymous_bytes > free_bytes:
        raise MemoryBudgetError(
            f"model {name}: its weights take {format_bytes(anonymous_bytes)} when they are unpacked, "
            f"{free} of memory are free",
            hint="close other programs, or take a file of a type that stays packed, such as Q4_K_M or Q8_0",
        )
    if anonymous_bytes + file_bytes > free_bytes:
        notice(
            f"model {name}: its weights take {format_bytes(anonymous_bytes + file_bytes)} and {free} of memory "
            "are free, so every token reads some of them from disk again"
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
        raise ModelError(f"model {name}: no such file or directory", hint=_WHERE)
    problem = problem_with(name)
    if problem is None:
        return name, False
    if problem.final or not has_cached(name):
        raise ModelError(f"model {name}: {problem.text}", hint=problem.hint or _WHERE)
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
    name: str, source: str, local: bool, dtype: str, notice: Callable[[str], None]
) -> tuple[PreTrainedModel, Any]:
    options = {"local_files_only": local, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        chosen = _choose_dtype(dtype, getattr(config.get_text_config(), "dtype", None) or config.dtype)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except _DAMAGED as error:
        hint = "the directory needs config.json and a tokenizer (tokenizer.json, tokenizer_config.json)"
        raise _cannot_load(name, "", error, hint) from error
    try:
        GenerationConfig.from_pretrained(source, **options)
    except ValueError as error:  # keys that contradict each other
        hint = "remove from that file what the message names"
        raise _cannot_load(name, "generation_config.json: ", error, hint) from error
    except OSError:
        pass  # most checkpoints have one, but none needs it
    try:
        model, info = _load_weights(source, {"config": config, "dtype": chosen, **options}, notice)
    except _DAMAGED as error:
        hint = f"{source} may be damaged or incomplete: fetch it again" if local else _WHERE
        if (quantised := getattr(config, "quantization_config", None)) is not None:
            kind = quantised.get("quant_method", "") if isinstance(quantised, dict) else quantised.quant_method
            hint = f"its weights are quantised ({kind}) and need the packages and devices of that; or take others"
        raise _cannot_load(name, "its weights cannot be loaded: ", error, hint) from error
    check_weights(name, info)
    if (unused := unused_weights(name, info)) is not None:
        notice(unused)
    return model, tokenizer


def _load_weights(
    source: str, options: dict[str, Any], notice: Callable[[str], None]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and what transformers says about its tensors. Attention is sdpa, or eager in families without it."""
    options = {**options, "use_safetensors": True, "output_loading_info": True}
    try:
        found = AutoModelForCausalLM.from_pretrained(source, attn_implementation="sdpa", **options)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        notice("this family has no sdpa attention: its eager attention is used, which needs more memory")
        found = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager", **options)
    return found  # type: ignore[no-any-return]


def _cannot_load(name: str, what: str, error: BaseException, hint: str) -> ModelError:
    text = _first_line(error)
    if _CODE_OF_ITS_OWN in str(error):
        text, hint = "it brings Python code of its own, which kvswap never runs", "use a family that transformers has"
    elif isinstance(error, ImportError) or " install" in text:
        hint = "install the package that is named, or use a model that does not need it"
    elif "safetensors" in text and isinstance(error, OSError):
        hint = "weights are read from .safetensors files only, since other kinds can run code: convert them"
    return ModelError(f"model {name}: {what}{text}", hint=hint)


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
