"""Wires a model, a cache and the two paths together, and takes everything apart again.

While attached, every decoder layer's ``forward`` is ours (an instance attribute: hooks cannot chunk, and replacing
modules would rename weights), and the model's attention and mask functions are ours by name. A call whose cache is not
of this attachment gets the model's original attention and mask.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvswap.config import Config
from kvswap.core.cache import KVSwapCache
from kvswap.core.calibration import calibrate
from kvswap.core.layer_major import FullCache, LayerMajorCache, Progress
from kvswap.disk import create_backend
from kvswap.disk.files import check_free, prepare_dir
from kvswap.disk.folders import kv_folder
from kvswap.errors import ModelError, UnsupportedError
from kvswap.lab.rivals import registry
from kvswap.models.adapter import LayerParts, ModelParts, cache_keyword, inspect
from kvswap.models.masks import NAME, defer_mask, resolve
from kvswap.selection.basis import KeyCovariance
from kvswap.selection.kvswap import code_maker
from kvswap.selection.method import KeyFacts
from kvswap.sessions.binding import Keeper

_MARK = "_kvswap_attachment"


class Attachment:
    """One model under kvswap. ``restore`` leaves it as it was."""

    def __init__(self, model: PreTrainedModel) -> None:
        if getattr(model, _MARK, None) is not None:
            raise ModelError("this model is attached already", hint="leave the first attach block before the second")
        self.parts = inspect(model)
        self.implementation: str = self.parts.config._attn_implementation
        self._cache_keyword = cache_keyword(model)
        self._restore: list[Callable[[], None]] = []
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, defer_mask)
        setattr(model, _MARK, self)
        self._restore.append(partial(delattr, model, _MARK))
        for part in self.parts.layers:
            self._wrap(part)
        self.parts.config._attn_implementation = NAME
        self._restore.append(partial(setattr, self.parts.config, "_attn_implementation", self.implementation))

    def restore(self) -> None:
        """Undo everything, last change first."""
        while self._restore:
            self._restore.pop()()

    def _wrap(self, part: LayerParts) -> None:
        # accelerate keeps the layer's own forward there and moves weights round it: chunks must not each move them
        name = "_old_forward" if hasattr(part.module, "_hf_hook") else "forward"
        module, forward = part.module, getattr(part.module, name)
        had = name in module.__dict__
        object.__setattr__(module, name, partial(self._forward, part, forward))
        undo = partial(object.__setattr__, module, name, forward) if had else partial(module.__dict__.pop, name)
        self._restore.append(undo)
        if part.attention is not None:
            part.attention.__dict__[_MARK] = self
            self._restore.append(partial(part.attention.__dict__.pop, _MARK))

    def _forward(
        self, part: LayerParts, forward: Callable[..., Any], hidden_states: torch.Tensor, **kwargs: Any
    ) -> Any:
        cache = kwargs.get(self._cache_keyword)
        if not isinstance(cache, LayerMajorCache) or cache.parts is not self.parts:
            mask = resolve(kwargs.pop("attention_mask", None), self.implementation)
            return forward(hidden_states, attention_mask=mask, **kwargs)
        ours = _Call(cache, part) if part.order is not None else None
        output = cache.run_layer(part, forward, hidden_states, {**kwargs, "kvswap_call": ours})
        if ours is not None and not ours.attended:
            raise ModelError(
                f"{type(self.parts.model).__name__}: layer {part.index} hands no keyword arguments to attention",
                hint="this family is not supported",
            )
        return output


class _Call:
    """Travels as a keyword argument from a layer's wrapper to its attention, which thus finds its cache."""

    __slots__ = ("attended", "cache", "part")

    def __init__(self, cache: LayerMajorCache, part: LayerParts) -> None:
        self.cache, self.part, self.attended = cache, part, False


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """The attention function registered under our name."""
    attachment: Attachment = module.__dict__[_MARK]
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    stock = ALL_ATTENTION_FUNCTIONS.get_interface(attachment.implementation, eager)
    call: _Call | None = kwargs.pop("kvswap_call", None)
    if call is None:
        output: tuple[torch.Tensor, None] = stock(module, query, key, value, attention_mask, **kwargs)
        return output
    call.attended = True
    return call.cache.attention(call.part, stock, query, key, value, attention_mask, kwargs), None


@contextmanager
def attach(
    model: PreTrainedModel,
    config: Config | None = None,
    *,
    tokenizer: Any = None,
    method: str = "kvswap",
    on_progress: Progress | None = None,
    on_notice: Callable[[str], None] | None = None,
    keeper: Keeper | None = None,
) -> Iterator[KVSwapCache | FullCache]:
    """Put a model's KV cache on disk for the length of a ``with`` block.

    Gives a cache for ``model.generate(**inputs, past_key_values=cache)``. The cache trusts the caller that what it
    stores is a prefix of the input, as transformers' caches do. On leaving, also by an exception, files are gone and
    the model is as it was. One attachment per model at a time; the block and ``generate`` may be in different threads.

    Parameters
    ----------
    tokenizer
        For calibration, once per model; without it (and without a cached calibration) whole-key codes are used.
    method
        A name in ``kvswap.lab.rivals.registry``. ``"full"`` keeps everything in memory, with the same chunked prefill.
    on_progress
        Called with ``("calibrate" | "prefill", done, total)``.
    on_notice
        Called with a sentence where something falls back.
    keeper
        The session that the context comes from and is committed to (``kvswap.Session`` makes it); without one nothing
        is durable.

    Raises
    ------
    ModelError, StorageError, ConfigError
        At the start; MemoryBudgetError and UnsupportedError when a prompt arrives.
    """
    wanted = [(method, config or Config())]
    options: dict[str, Any] = {"tokenizer": tokenizer, "on_progress": on_progress, "on_notice": on_notice}
    with attach_each(model, wanted, keeper=keeper, **options) as caches:
        yield caches[0]


@contextmanager
def attach_each(
    model: PreTrainedModel,
    wanted: Sequence[tuple[str, Config]],
    *,
    tokenizer: Any = None,
    on_progress: Progress | None = None,
    on_notice: Callable[[str], None] | None = None,
    keeper: Keeper | None = None,
) -> Iterator[list[KVSwapCache | FullCache]]:
    """Several caches of one model side by side, one for each ``(method, config)``, to compare methods in turns.

    As ``attach`` otherwise; every cache has its own files and its own limit. The model takes them one call at a time.
    """
    notice = on_notice or (lambda text: None)
    for name, _ in wanted:
        registry.check_name(name)
    attachment = Attachment(model)
    caches: list[KVSwapCache | FullCache] = []
    try:
        for method, config in wanted:
            caches.append(_open(attachment, method, config, tokenizer, on_progress, notice, keeper))
        yield caches
    finally:
        attachment.restore()
        for cache in caches:
            cache.close()


def _open(
    attachment: Attachment,
    method: str,
    config: Config,
    tokenizer: Any,
    on_progress: Progress | None,
    notice: Callable[[str], None],
    keeper: Keeper | None,
) -> KVSwapCache | FullCache:
    if keeper is not None and method != "kvswap":
        raise UnsupportedError(f"a session with method {method}", hint="only kvswap keeps sessions")
    if method in registry.MEMORY:
        return registry.opener(method)(attachment.parts, attachment.implementation, config, on_progress)
    return _open_cache(attachment, method, config, tokenizer, on_progress, notice, keeper)


def _open_cache(
    attachment: Attachment,
    name: str,
    config: Config,
    tokenizer: Any,
    on_progress: Progress | None,
    notice: Callable[[str], None],
    keeper: Keeper | None,
) -> KVSwapCache:
    parts, method = attachment.parts, registry.find(name)
    config = method.configure(config if keeper is None else keeper.config(config))
    folder = prepare_dir(kv_folder(config.kv_dir))
    backend = create_backend(config.backend, folder, config.read_depth, on_notice=notice)
    try:
        stored = keeper.bases(parts.device) if keeper is not None else None
        started_s = time.perf_counter()
        facts = KeyFacts(
            layers=len(parts.offloaded),
            query_heads=parts.query_heads,
            kv_heads=parts.kv_heads,
            head_dim=parts.head_dim,
            device=parts.device,
            turn=partial(_turn, parts),
            statistics=_statistics(attachment, config, tokenizer, on_progress, notice)
            if method.calibrated and stored is None
            else None,
        )
        if stored is None:
            makers = method.makers(facts, config)
        else:
            makers = [code_maker(facts, basis, bits, config.group_tokens) for basis, bits in stored]
        if facts.statistics is not None:  # makers remember the facts, and moments are three times a basis
            facts.statistics.clear()
        cache = KVSwapCache(
            parts,
            attachment.implementation,
            config=config,
            method=method,
            backend=backend,
            makers=makers,
            store_dtype=_store_dtype(config, parts),
            check_space=keeper.room if keeper is not None else partial(check_free, folder),
            on_progress=on_progress,
            keeper=keeper,
        )
        cache.trace.calibration_s = time.perf_counter() - started_s
    except BaseException:
        backend.close()
        raise
    return cache


def _statistics(
    attachment: Attachment, config: Config, tokenizer: Any, on_progress: Progress | None, notice: Callable[[str], None]
) -> list[KeyCovariance] | None:
    """Statistics of every offloaded layer's keys, or None without a tokenizer to read text with."""
    if tokenizer is None:
        notice("no tokenizer to calibrate with: whole-key 2-bit codes are used for the sketch")
        return None
    return calibrate(
        attachment.parts,
        attachment.implementation,
        tokenizer,
        run=partial(_run, attachment.parts),
        chunk_tokens=config.chunk_tokens,
        on_progress=on_progress,
        on_notice=notice,
    )


@torch.no_grad()
def _turn(parts: ModelParts, keys: torch.Tensor, positions: torch.Tensor, inverse: bool) -> torch.Tensor:
    """RoPE of the first offloaded layer, put on or taken off keys ``[H_kv, n, d]`` at ``positions`` ``[n]``."""
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
