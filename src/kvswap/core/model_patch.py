"""Puts kvswap's forward and attention into a model, and takes them out again.

While attached, every decoder layer has our ``forward`` as an instance attribute: hooks cannot chunk, and replacing
modules would rename weights. The model's attention and mask functions are ours by name. A call with a cache of somebody
else gets the model's original attention and mask. ``core/attach.py`` opens the caches.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvswap.core.layer_major import AttentionInput, LayerMajorCache
from kvswap.core.model_state import model_state
from kvswap.errors import ModelError
from kvswap.models.adapter import LayerParts, check_placement, inspect
from kvswap.models.masks import NAME, defer_mask, resolve

_MARK = "_kvswap_attachment"
_PREFILL = "_prefill"  # the method by which ``generate`` computes its prompt


class Attachment:
    """One model under kvswap. ``restore`` leaves it as it was."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.parts = inspect(model)
        decoder = self.parts.decoder  # carries the mark: ``model`` may be one of several wrappers
        if getattr(decoder, _MARK, None) is not None:
            raise ModelError("this model is attached already", hint="leave the first attach block before the second")
        check_placement(self.parts)
        self.state = model_state(model, decoder, self.parts.config)
        """What the model was before it was changed, or None where that cannot be told."""
        self.implementation: str = self.parts.config._attn_implementation
        self._restore: list[Callable[[], None]] = []
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, defer_mask)
        setattr(decoder, _MARK, self)
        self._restore.append(partial(delattr, decoder, _MARK))
        for part in self.parts.layers:
            self._wrap(part)
        for module in model.modules():
            if hasattr(type(module), _PREFILL):
                self._wrap_generate(module)
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

    def _wrap_generate(self, module: Any) -> None:
        """Have the prompt of ``generate`` run as a prompt. All of it but one token may be stored already."""
        prefill, had = getattr(module, _PREFILL), _PREFILL in module.__dict__
        object.__setattr__(module, _PREFILL, partial(self._prefill, prefill))
        undo = partial(object.__setattr__, module, _PREFILL, prefill) if had else None
        self._restore.append(undo or partial(module.__dict__.pop, _PREFILL))

    def _prefill(self, prefill: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, dict)]  # the arguments of forward
        cache = self._cache_in(value for each in given for value in each.values())
        with contextlib.nullcontext() if cache is None else cache.prompt():
            return prefill(*args, **kwargs)

    def _cache_in(self, values: Iterable[Any]) -> LayerMajorCache | None:
        """Our cache among the arguments of a call; None where there is none, or one of another model."""
        cache = next((each for each in values if isinstance(each, LayerMajorCache)), None)
        return cache if cache is not None and cache.parts is self.parts else None

    def _forward(
        self, part: LayerParts, forward: Callable[..., Any], hidden_states: torch.Tensor, **kwargs: Any
    ) -> Any:
        cache = self._cache_in(kwargs.values())
        if cache is None:
            mask = resolve(kwargs.pop("attention_mask", None), self.implementation)
            return forward(hidden_states, attention_mask=mask, **kwargs)
        ours = _Call(cache, part) if part.attention is not None else None
        output = cache.call_layer(part, forward, hidden_states, {**kwargs, "kvswap_call": ours})
        if part.order is not None and ours is not None and not ours.attended:
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
    given = AttentionInput(call.part, stock, query, key, value, attention_mask, kwargs)
    return (call.cache.attention_in_memory if call.part.order is None else call.cache.attention)(given), None
