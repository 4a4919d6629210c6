"""kvswap as a program to compare: the model, attached, with one cache. Runs in a process of its own (``worker``)."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from collections.abc import Sequence
from typing import Any

import torch

from kvswap.app.documents import read_document
from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.lab.bench.interleaved import timed_call
from kvswap.lab.bench.run import encode
from kvswap.lab.evals.evaluation_text import evaluation_text
from kvswap.models.loading import LoadedModel, load_model, quieten
from kvswap.sessions.session import Session


class KVSwap:
    """A loaded model that is attached when a prompt comes."""

    def __init__(self, loaded: LoadedModel, config: Config) -> None:
        self._loaded, self._config = loaded, config
        self._attachment: Any = None
        self._cache: Any = None

    def encode(self, documents: Sequence[str]) -> dict[str, list[int]]:
        """The tokens that all programs get: those of the evaluation text, the user's documents first.

        Raises InputError.
        """
        passages = evaluation_text([read_document(path) for path in documents])
        return {"tokens": encode(self._loaded.tokenizer, passages)}

    def prefill(self, tokens: Sequence[int]) -> dict[str, float]:
        """Take a prompt into a cache. Calibration, which happens once a model, is not part of its seconds."""
        self._attachment = attach(self._loaded.model, self._config, tokenizer=self._loaded.tokenizer)
        self._cache = self._attachment.__enter__()
        return {"prefill_s": timed_call(self._loaded.model, torch.tensor([list(tokens)]), self._cache)[1]}

    def resume(self, context: str) -> dict[str, float]:
        """Open the session named ``context`` in place of a prompt. Its sketch is read with the first step."""
        start_s = time.perf_counter()
        self._attachment = Session.open(context, self._loaded, self._config)
        self._cache = self._attachment.cache
        return {"resume_s": time.perf_counter() - start_s}

    def steps(self, tokens: Sequence[int]) -> dict[str, list[Any]]:
        """Take tokens one by one."""
        calls = [timed_call(self._loaded.model, torch.tensor([[token]]), self._cache) for token in tokens]
        return {"step_s": [took_s for _, took_s in calls], "top": [int(row.argmax()) for row, _ in calls]}

    def stats(self) -> dict[str, Any]:
        """What the cache has counted."""
        return dataclasses.asdict(self._cache.stats)

    def versions(self) -> dict[str, str]:
        """Versions of kvswap and of what computes for it."""
        return {name: importlib.metadata.version(name) for name in ("kvswap", "torch", "transformers")}


def open_program(request: dict[str, Any]) -> KVSwap:
    """Load the model of a request. Raises ModelError, ConfigError, StorageError."""
    torch.set_num_threads(request["threads"])
    quieten()
    return KVSwap(load_model(request["model"]), Config(**request["config"]))
