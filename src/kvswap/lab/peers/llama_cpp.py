"""llama.cpp as a program to compare, through the package llama-cpp-python. Runs in a process of its own (``worker``).

Flash attention is on, K, V have 16 bits and the file is mapped, as llama.cpp does by default. Prompts go in batches of
512 tokens, its default.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import time
from collections.abc import Sequence
from typing import Any

from kvswap.errors import ConfigError, ModelError

PACKAGE = "llama-cpp-python"
BATCH_TOKENS = 512


class LlamaCpp:
    """A model file and one context of llama.cpp."""

    def __init__(self, api: Any, model: Any, context: Any) -> None:
        self._api, self._context = api, context
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))

    def prefill(self, tokens: Sequence[int]) -> dict[str, float]:
        """Take a prompt into the context."""
        start_s = time.perf_counter()
        for first in range(0, len(tokens), BATCH_TOKENS):
            self._decode(tokens[first : first + BATCH_TOKENS])
        self._top()
        return {"prefill_s": time.perf_counter() - start_s}

    def resume(self, context: str) -> dict[str, float]:
        """Load the state of a sequence from the file ``context``, in place of a prompt. Raises ModelError."""
        start_s = time.perf_counter()
        room, tokens = self._api.llama_n_ctx(self._context), ctypes.c_size_t()
        ids = (self._api.llama_token * room)()
        size_bytes = self._api.llama_state_seq_load_file(self._context, context.encode(), 0, ids, room, tokens)
        if not size_bytes:
            raise ModelError(f"llama.cpp cannot load the state {context}", hint="make it anew, with this version")
        return {"resume_s": time.perf_counter() - start_s}

    def steps(self, tokens: Sequence[int]) -> dict[str, list[Any]]:
        """Take tokens one by one."""
        step_s, top = [], []
        for token in tokens:
            start_s = time.perf_counter()
            self._decode([token])
            top.append(self._top())
            step_s.append(time.perf_counter() - start_s)
        return {"step_s": step_s, "top": top}

    def versions(self) -> dict[str, str]:
        """The version of the package."""
        return {PACKAGE: importlib.metadata.version(PACKAGE)}

    def _decode(self, tokens: Sequence[int]) -> None:
        array = (self._api.llama_token * len(tokens))(*tokens)
        code = self._api.llama_decode(self._context, self._api.llama_batch_get_one(array, len(tokens)))
        if code != 0:
            raise ModelError(f"llama.cpp: llama_decode returned {code}", hint="use a shorter context")

    def _top(self) -> int:
        """The most likely next token; waits for the logits."""
        import numpy as np

        row = self._api.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(row, (self._vocabulary,)).argmax())


def open_program(request: dict[str, Any]) -> LlamaCpp:
    """Load the file of a request. Raises ConfigError without the package, ModelError for a file it does not read."""
    try:
        import llama_cpp as api
    except ImportError as error:
        raise ConfigError(f"--peers llama.cpp: {error}", hint=f"run: pip install {PACKAGE}") from error
    api.llama_log_set(_LOG, ctypes.c_void_p(0))
    api.llama_backend_init()
    model = api.llama_model_load_from_file(request["file"].encode(), api.llama_model_default_params())
    if not model:
        raise ModelError(f"llama.cpp cannot load {request['file']}", hint="give a .gguf file that llama.cpp reads")
    settings = api.llama_context_default_params()
    settings.n_ctx = request["context_tokens"]
    settings.n_batch = settings.n_ubatch = BATCH_TOKENS
    settings.n_threads = settings.n_threads_batch = request["threads"]
    settings.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
    context = api.llama_init_from_model(model, settings)
    if not context:
        raise ModelError(
            f"llama.cpp has no memory for {request['context_tokens']:,} tokens", hint="use a shorter context"
        )
    return LlamaCpp(api, model, context)


def _quiet(level: int, text: bytes, data: int) -> None:
    """Drop what llama.cpp logs."""


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_quiet)
"""Lives as long as the module: C keeps a pointer to it."""
