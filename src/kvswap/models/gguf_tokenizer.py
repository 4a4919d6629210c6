"""The tokenizer that a GGUF file describes, as transformers reads it.

Reading it anew takes seconds for a large vocabulary. So it is kept in the cache folder, in the format of tokenizers,
and is read from there the next time. The name of that file has everything that it was made of: a digest of the model's
header and the versions of the libraries. A file that is not as it was written, or cannot be written, does not count.
One thread.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from kvswap.disk.atomic import atomic_write
from kvswap.disk.folders import models_folder
from kvswap.errors import KVSwapError, ModelError
from kvswap.weights.gguf_file import GgufFile

_log = logging.getLogger("kvswap")
LEAST_TOKENS = 10_000
"""Smaller vocabularies are read anew, which takes no time."""
_VERSION = 1


def tokenizer_of(file: GgufFile) -> Any:
    """The tokenizer of a model's file. Raises ModelError where it cannot be read."""
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    path = _path(file)
    kept = None if path is None else _kept(path)
    try:
        backend, settings = kept or _described(file)
        found = TokenizersBackend(tokenizer_object=backend, **settings)
    except Exception as error:  # tokenizers raises no other
        raise ModelError(
            f"model {file.path}: its tokenizer cannot be read: {error}",
            hint="give the model directory it was made from",
        ) from error
    if path is not None and kept is None:
        _keep(path, backend, settings)
    return found


def _described(file: GgufFile) -> tuple[Any, dict[str, Any]]:
    """The tokenizer of the library, and the settings that transformers wraps it with."""
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, described, settings = get_gguf_tokenizer(str(file.first_path))
    backend, more = convert_gguf_tokenizer(architecture, described)
    return backend, {**settings, **more}


def _path(file: GgufFile) -> Path | None:
    """Where the tokenizer is kept; None where it is small, and where there is no cache folder."""
    if len(file.metadata.get("tokenizer.ggml.tokens", ())) < LEAST_TOKENS:
        return None
    made_of = _VERSION, file.header_digest, tokenizers.__version__, transformers.__version__
    with suppress(KVSwapError, OSError):
        return models_folder() / f"tokenizer-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]}.json"
    return None


def _kept(path: Path) -> tuple[Any, dict[str, Any]] | None:
    """What ``_keep`` wrote; None where there is nothing, or something else."""
    with suppress(OSError, ValueError):
        digest, settings, backend = path.read_bytes().split(b"\n", 2)
        if digest == _digest(settings, backend):
            return tokenizers.Tokenizer.from_buffer(backend), json.loads(settings)
    return None


def _keep(path: Path, backend: Any, settings: dict[str, Any]) -> None:
    """Write a tokenizer to the cache folder: digest, settings, tokenizer, a line each."""
    try:
        lines = json.dumps(settings).encode(), backend.to_str().encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, b"\n".join((_digest(*lines), *lines)))
    except (OSError, TypeError) as error:  # no room, or a setting that is no JSON: it will be read anew
        _log.debug("the tokenizer is not kept in %s: %s", path, error)


def _digest(settings: bytes, backend: bytes) -> bytes:
    return hashlib.sha256(settings + b"\n" + backend).hexdigest().encode()
