"""The check at attach: no family is believed by its name.

``attach`` calls ``check_once``. A model object that has passed is checked again only where it changed since, as far as
``core/model_state.py`` can tell; one that was refused always is. A decode step of a few sequences goes through the
attached model with a cache that stores nothing. Every offloaded layer runs up to its attention, so neither attention
nor MLP is computed. There the query that the model computed is compared with the one that kvswap predicts from the same
hidden state. A layer with other norms, partial or absent RoPE, or anything else that the adapter does not know is found
before a prompt has been read. The model and the state of random numbers stay as they were. In: parts of an attached
model. Out: nothing, or ModelError. The thread that attaches.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.cache_utils import CacheLayerMixin

from kvswap.core.layer_major import AttentionInput, LayerForward, LayerMajorCache
from kvswap.core.model_patch import Attachment
from kvswap.core.query_prediction import QueryPredictor
from kvswap.errors import KVSwapError, ModelError
from kvswap.models.adapter import LayerParts, ModelParts, cache_keyword, context_limit
from kvswap.models.masks import DeferredMask

LEAST_COSINE = 0.999
BATCH = 4
_POSITION = 1001
"""Tokens that the cache claims to hold: RoPE turns nothing at position 0."""
_HINT = "this family is not supported yet; run it without kvswap"


class _ReachedAttention(Exception):  # noqa: N818 - not an error
    """Ends a layer where its attention begins."""


class Through(Exception):  # noqa: N818 - not an error
    """Ends the forward after the last layer."""


_passed: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()
"""The states of models that passed, by their decoder."""


def check_once(attachment: Attachment) -> None:
    """``check_prediction`` for an attached model, unless it has passed and is what it was then. Raises ModelError."""
    decoder, state = attachment.parts.decoder, attachment.state
    if state is not None and _passed.get(decoder) == state:
        return
    _passed.pop(decoder, None)
    check_prediction(attachment.parts, attachment.implementation)
    if state is not None:
        _passed[decoder] = state


@torch.no_grad()
def check_prediction(parts: ModelParts, implementation: str) -> None:
    """Compare predicted with true queries in every offloaded layer of an attached model.

    Raises ModelError with the layer and the reason where they differ, where the layer does more to keys, values or mask
    than kvswap does, or where its forward cannot run under kvswap at all.
    """
    name = type(parts.model).__name__
    trial = _Trial(parts, implementation)
    try:
        send_through(parts, trial, BATCH)
    except ModelError:
        raise
    except Exception as error:
        reason = error.message if isinstance(error, KVSwapError) else f"{type(error).__name__}: {error}"
        raise ModelError(f"{name}: layer {trial.index} cannot run under kvswap: {reason}", hint=_HINT) from error


def send_through(parts: ModelParts, trial: LayerMajorCache, batch: int) -> None:
    """Send one token of ``batch`` sequences through the layers of an attached model, with ``trial`` as its cache.

    The trial raises ``Through`` in the last layer. Raises ModelError where that was not reached.
    """
    device = _embeddings(parts).weight.device
    ids = torch.tensor(_token_ids(parts)[:batch], device=device)[:, None]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            parts.model(input_ids=ids, use_cache=True, **{cache_keyword(parts.model): trial})
        except Through:
            return
    raise ModelError(f"{type(parts.model).__name__}: its forward does not reach the last of its layers", hint=_HINT)


class _Trial(LayerMajorCache):
    """Claims to hold some tokens, stores nothing, and looks at what reaches attention."""

    def __init__(self, parts: ModelParts, implementation: str) -> None:
        layers = [Passing(trial_position(parts)) for _ in parts.layers]
        super().__init__(parts, implementation, layers, chunk_tokens=512, on_progress=None)
        self._predictor = QueryPredictor(parts)
        self._before: tuple[LayerParts, dict[str, Any]] | None = None
        self._predicted = torch.empty(0)
        self.index = 0

    def run_layer(self, part: LayerParts, forward: LayerForward, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        """Run one offloaded layer up to its attention; every layer gives back its input."""
        self.index = part.index
        if not isinstance(kwargs.get("attention_mask"), DeferredMask):
            self._refuse(part, f"of type {part.layer_type} has a mask of another kind")
        self._chunk_kwargs(part, kwargs, 0, 1)  # what a prompt will do with the arguments of the model
        if part.order is not None:
            before, arguments = self._before or (part, kwargs)
            self._predicted = self._predictor.query(part, before, hidden, arguments)
            try:
                forward(hidden, **{**kwargs, "attention_mask": None})
            except _ReachedAttention:
                pass
            else:
                self._refuse(part, "hands no keyword arguments to attention")
        self._before = part, kwargs
        if part.index == len(self.parts.layers) - 1:
            raise Through
        return hidden

    def attention(self, given: AttentionInput) -> torch.Tensor:
        """Compare the query that the model computed with the predicted one."""
        part, query, keys, values = given.part, given.query, given.keys, given.values
        passed, predicted = self.layers[part.index].given, self._predicted
        if passed is None:
            self._refuse(part, "attends to keys and values that do not go through its cache")
        elif not (_is_same(keys, passed[0]) and _is_same(values, passed[1])):
            self._refuse(part, "changes keys or values between cache and attention")
        if keys.shape != values.shape or keys.shape[1::2] != (self.parts.kv_heads, self.parts.head_dim):
            self._refuse(part, f"has keys {tuple(keys.shape[1::2])} and values {tuple(values.shape[1::2])}")
        if given.mask is not None:
            self._refuse(part, "makes a mask of its own")
        if given.arguments.get("position_bias") is not None:
            self._refuse(part, "adds a bias by position to its attention")
        scaling = given.arguments.get("scaling") or self.parts.scaling
        if scaling != self.parts.scaling:
            self._refuse(part, f"scales by {scaling} instead of {self.parts.scaling}")
        if predicted.shape != query[:, :, 0].shape:
            self._refuse(part, f"has queries {tuple(query.shape)}")
        worst = _worst_cosine(predicted, query[:, :, 0])
        if not worst >= LEAST_COSINE:
            self._refuse(part, f"computes another query than is predicted for it (cosine {worst:.3f})")
        raise _ReachedAttention

    def _refuse(self, part: LayerParts, what: str) -> None:
        raise ModelError(f"{type(self.parts.model).__name__}: layer {part.index} {what}", hint=_HINT)


class Passing(CacheLayerMixin):  # type: ignore[misc] # transformers is not typed
    """A layer of the trial: K, V pass through it."""

    is_sliding = False

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens
        self.given: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to set up."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Give back what came."""
        self.given = key_states, value_states
        return self.given

    def get_seq_length(self) -> int:
        """The tokens that it claims to hold."""
        return self._tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of K in a mask."""
        return self._tokens + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def _embeddings(parts: ModelParts) -> Any:
    decoder: Any = parts.decoder
    return decoder.get_input_embeddings()


def trial_position(parts: ModelParts) -> int:
    limit = context_limit(parts.model)
    return _POSITION if limit is None else max(1, min(_POSITION, limit - 1))


def _token_ids(parts: ModelParts) -> list[int]:
    """A few ids from all over the vocabulary; not those of padding or pictures."""
    vocabulary = len(_embeddings(parts).weight)
    settings = {**vars(parts.config), **vars(parts.model.config)}
    special = {value for key, value in settings.items() if "token" in key and isinstance(value, int)}
    usual = [each for each in range(0, vocabulary, max(1, vocabulary // 64)) if each not in special] or [0]
    return [usual[number * len(usual) // BATCH] for number in range(BATCH)]


def _is_same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor is other or (tensor.shape == other.shape and tensor.data_ptr() == other.data_ptr())


def _worst_cosine(predicted: torch.Tensor, true: torch.Tensor) -> float:
    """The smallest cosine of ``[B, H_q, d]`` over sequences and heads; equal queries count as 1, also where 0."""
    predicted, true = predicted.double(), true.double()
    cosine = functional.cosine_similarity(predicted, true, dim=-1)
    return float(torch.where((predicted == true).all(-1), 1.0, cosine).min())
