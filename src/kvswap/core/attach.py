"""Opens caches for a model: ``attach`` is what users call, ``attach_each`` opens several side by side.

A cache needs a model under kvswap (``core/model_patch.py``), a disk backend, and a sketch that was calibrated for the
model. What a session stores replaces calibration.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvswap.config import AUTO_SHARE, Config
from kvswap.core.binding import Binding
from kvswap.core.cache import KVSwapCache
from kvswap.core.calibration import calibrate
from kvswap.core.compiled_layers import CompiledLayers, compiled_layers
from kvswap.core.kept_bases import kept_bases
from kvswap.core.layer_major import FullCache, InMemory, LayerMajorCache, Progress, ordinary_tensors
from kvswap.core.model_patch import Attachment
from kvswap.core.prediction_check import check_once
from kvswap.disk import create_backend
from kvswap.disk.backend import ReadBackend
from kvswap.disk.files import check_free, prepare_dir
from kvswap.disk.folders import kv_folder
from kvswap.disk.read_rate import reads_per_s
from kvswap.errors import ConfigError, UnsupportedError
from kvswap.models.adapter import ModelParts, cache_keyword
from kvswap.selection.basis import KeyCovariance
from kvswap.selection.kvswap import code_maker
from kvswap.selection.kvswap import method as own_method
from kvswap.selection.method import KeyFacts, Method, SketchMaker

SHARES = ((40_000, AUTO_SHARE), (12_000, 2 * AUTO_SHARE))
"""From so many reads a second on, a selection that grows takes one token in so many of the context."""
UNKNOWN_SHARE, SLOW_SHARE = 2 * AUTO_SHARE, 4 * AUTO_SHARE
_log = logging.getLogger("kvswap")


@contextmanager
def attach(
    model: PreTrainedModel,
    config: Config | None = None,
    *,
    tokenizer: Any = None,
    method: Method | InMemory | None = None,
    on_progress: Progress | None = None,
    on_notice: Callable[[str], None] | None = None,
    **settings: Any,
) -> Iterator[KVSwapCache | FullCache]:
    """Keep a model's KV cache on disk for the length of a ``with`` block.

    The block gets a cache for ``model.generate(**inputs, cache=cache)``. As with the caches of transformers, the caller
    vouches that what it stores is a prefix of the input. At the end of the block, also after an exception, the
    files are gone and the model is as it was. A model takes one attachment at a time. The block and ``generate`` may be
    in different threads: where ``generate`` still runs at the end of the block, it gets an UnsupportedError.

    Parameters
    ----------
    config, settings
        The configuration, and keys of ``Config`` that replace its values: ``attach(model, kv_memory="24MiB")``.
    tokenizer
        Reads the calibration text, once for each model. Without it, and without an earlier calibration of this model,
        the sketch holds 2-bit codes of whole keys.
    method
        A method to compare with, as ``kvswap.lab.rivals.find`` gives it; None is kvswap's own.
    on_progress
        Called with ``("calibrate" | "prefill", done, total)``.
    on_notice
        Called with a sentence when kvswap falls back to something slower or worse.

    Raises
    ------
    ModelError, StorageError, ConfigError
        On entry.
    MemoryBudgetError, UnsupportedError
        When a prompt arrives.
    """
    config = (config or Config()).replace(**settings)
    options: dict[str, Any] = {"tokenizer": tokenizer, "on_progress": on_progress, "on_notice": on_notice}
    with attach_each(model, [(method, config)], **options) as caches:
        yield caches[0]


@contextmanager
def attach_each(
    model: PreTrainedModel,
    variants: Sequence[tuple[Method | InMemory | None, Config]],
    *,
    tokenizer: Any = None,
    on_progress: Progress | None = None,
    on_notice: Callable[[str], None] | None = None,
    binding: Binding | None = None,
) -> Iterator[list[KVSwapCache | FullCache]]:
    """Open several caches of one model side by side, one for each ``(method, config)``.

    Every cache has its own files and memory limit. The model takes them one call at a time. With ``binding``, the
    context comes from a session and is committed to it. Other parameters are as for ``attach``.
    """
    notice = on_notice or _log.debug
    attachment = Attachment(model)
    caches: list[KVSwapCache | FullCache] = []
    try:
        with ordinary_tensors():
            compiled = None
            if any(not isinstance(method, InMemory) for method, _ in variants):
                check_once(attachment)
                if any(config.compiled_step != "off" for _, config in variants):
                    compiled = compiled_layers(attachment)
            for method, config in variants:
                method = method or own_method()
                if not isinstance(method, Method | InMemory):
                    raise ConfigError(f"method: got {method!r}", hint=f"pass kvswap.lab.rivals.find({method!r})")
                if binding is not None and method.name != own_method().name:
                    raise UnsupportedError(f"a session with method {method.name}", hint="only kvswap keeps sessions")
                if isinstance(method, InMemory):
                    caches.append(method.open(attachment.parts, attachment.implementation, config, on_progress))
                else:
                    opener = _Opener(attachment, method, tokenizer, on_progress, notice, binding, compiled)
                    caches.append(opener.open(config))
        yield caches
    finally:
        for cache in caches:
            cache.stop()
        attachment.restore()
        for cache in caches:
            cache.close()


class _Opener:
    """Opens caches that keep K, V on disk."""

    def __init__(
        self,
        attachment: Attachment,
        method: Method,
        tokenizer: Any,
        on_progress: Progress | None,
        notice: Callable[[str], None],
        binding: Binding | None,
        compiled: CompiledLayers | None,
    ) -> None:
        self._compiled = compiled
        self._attachment, self._parts, self._method = attachment, attachment.parts, method
        self._tokenizer, self._on_progress, self._notice, self._binding = tokenizer, on_progress, notice, binding

    def open(self, config: Config) -> KVSwapCache:
        """A cache with its files. Raises StorageError, ConfigError, UnsupportedError."""
        binding = self._binding
        config = config if binding is None else binding.config(config)
        if config.grows and self._method.name != own_method().name:  # published methods have a fixed M
            config = config.replace(select_tokens=config.least_select_tokens)
        config = self._method.configure(config)
        folder = prepare_dir(kv_folder(config.kv_dir))
        backend = create_backend(config.backend, folder, config.read_depth, on_notice=self._notice)
        try:
            started_s = time.perf_counter()
            makers = self._makers(config)
            cache = KVSwapCache(
                self._parts,
                self._attachment.implementation,
                config=config,
                method=self._method,
                backend=backend,
                makers=makers,
                store_dtype=_store_dtype(config, self._parts),
                check_space=partial(binding.reserve, planned=True)
                if binding is not None
                else partial(check_free, folder),
                on_progress=self._on_progress,
                binding=binding,
                compiled=self._compiled if config.compiled_step == "auto" else None,
                share=select_share(backend, folder) if config.grows else 0,
            )
            cache.trace.calibration_s = time.perf_counter() - started_s
        except BaseException:
            backend.close()
            raise
        _log.debug("%s: sketch %s, backend %s in %s", self._method.name, makers[0].label, backend.name, folder)
        return cache

    def _makers(self, config: Config) -> list[SketchMaker]:
        parts, stored = self._parts, None
        if self._binding is not None:
            stored = self._binding.bases(parts.device)
        facts = KeyFacts(
            layers=len(parts.offloaded),
            query_heads=parts.query_heads,
            kv_heads=parts.kv_heads,
            head_dim=parts.head_dim,
            device=parts.device,
            rotate=partial(_rotate, parts),
            bases=partial(kept_bases, parts),
            statistics=self._statistics(config) if self._method.calibrated and stored is None else None,
        )
        if stored is not None:
            return [code_maker(facts, basis, bits, config.group_tokens) for basis, bits in stored]
        makers = self._method.makers(facts, config)
        if facts.statistics is not None:  # makers remember the facts, and moments are three times a basis
            facts.statistics.clear()
        return makers

    def _statistics(self, config: Config) -> list[KeyCovariance] | None:
        """Statistics of every offloaded layer's keys, or None without a tokenizer to read text with."""
        if self._tokenizer is None:
            self._notice("no tokenizer to calibrate with: whole-key 2-bit codes are used for the sketch")
            return None
        return calibrate(
            self._parts,
            self._attachment.implementation,
            self._tokenizer,
            run=partial(_run, self._parts),
            chunk_tokens=config.chunk_tokens,
            on_progress=self._on_progress,
            on_notice=self._notice,
        )


def select_share(backend: ReadBackend, folder: Path) -> int:
    """One token in how many a selection that grows takes of the context: by how fast the disk answers small reads.

    Reads through the page cache say nothing about the disk, so they get the middle one.
    """
    if backend.name == "memory":
        return AUTO_SHARE
    if not backend.direct:
        return UNKNOWN_SHARE
    return share_for(reads_per_s(backend.name, folder))


def share_for(rate: float) -> int:
    """One token in how many for a disk that answers ``rate`` reads of 4 KiB a second."""
    return next((share for least, share in SHARES if rate >= least), SLOW_SHARE)


@torch.no_grad()
def _rotate(parts: ModelParts, keys: torch.Tensor, positions: torch.Tensor, inverse: bool) -> torch.Tensor:
    """Apply the first offloaded layer's RoPE, or its inverse, to keys ``[H_kv, n, d]`` at ``positions`` ``[n]``."""
    part = parts.offloaded[0]
    cos, sin = parts.rotary(keys, positions[None], part.layer_type)
    if inverse:
        scale = cos.square() + sin.square()  # some kinds of RoPE also scale
        cos, sin = cos / scale, -sin / scale
    assert part.rope is not None
    return part.rope(keys.transpose(0, 1), cos[0, :, None], sin[0, :, None]).transpose(0, 1)


@torch.no_grad()
def _run(parts: ModelParts, ids: torch.Tensor, cache: LayerMajorCache) -> None:
    parts.decoder(input_ids=ids, use_cache=True, **{cache_keyword(parts.model): cache})


def _store_dtype(config: Config, parts: ModelParts) -> torch.dtype:
    if config.store_dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.store_dtype)
        return dtype
    return parts.dtype if parts.dtype.itemsize == 2 else torch.float16
