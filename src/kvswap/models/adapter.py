"""Finds the parts of a model that kvswap needs: decoder layers, their norm, query projection and RoPE.

One generic adapter serves every family whose decoder layers have ``input_layernorm`` and ``self_attn`` with
``q_proj`` (Llama, Mistral, Qwen2, Qwen3, Gemma 3 and their kin). Modules are called as they are: ``q_proj`` may
be quantised or offloaded. Predictions use fused norms and RoPE (``fused``). ``inspect`` raises ModelError that names
what is missing.
"""

from __future__ import annotations

import inspect as signatures
import operator
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from kvswap.errors import InputError, ModelError
from kvswap.models.fused import Norm, fused_norm, fused_rope
from kvswap.models.mapped import check_files

_STRETCHED = ("yarn", "llama3")
_CONSTANT = {"sliding_attention", "chunked_attention", "linear_attention", "conv", "mamba", "moe"}
"""Types of layers whose state does not grow with the context."""


@dataclass(frozen=True, slots=True)
class LayerParts:
    """One decoder layer. ``order`` counts the offloaded layers; None where the layer stays in memory."""

    index: int
    order: int | None
    layer_type: str
    module: Any
    attention: Any
    norm: Norm
    rope: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None

    def predict_query(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: Norm | None = None
    ) -> torch.Tensor:
        """The query this layer would compute from ``hidden``, the input of this layer or of the one before.

        This layer's own input norm, projection, query norm and RoPE are used. ``norm`` replaces the input norm: the
        published artifact takes that of the previous layer.

        Parameters
        ----------
        hidden
            ``[B, 1, E]``; ``cos`` and ``sin`` are ``[B or 1, 1, d]``.

        Returns
        -------
        ``[B, H_q, d]``.
        """
        attention = self.attention
        query = attention.q_proj((norm or self.norm)(hidden))
        query = query.view(hidden.shape[0], -1, attention.head_dim)
        own = getattr(attention, "q_norm", None)
        if own is not None:
            query = own(query)
        assert self.rope is not None
        return self.rope(query, cos, sin)


@dataclass(frozen=True, slots=True)
class ModelParts:
    """A model seen by the engine. All offloaded layers have the same geometry."""

    model: PreTrainedModel
    decoder: nn.Module
    config: Any
    layers: tuple[LayerParts, ...]
    layer_kwargs: tuple[dict[str, Any], ...]
    query_heads: int
    kv_heads: int
    head_dim: int
    scaling: float

    @property
    def offloaded(self) -> list[LayerParts]:
        """The layers whose K, V go to disk, in order."""
        return [part for part in self.layers if part.order is not None]

    @property
    def device(self) -> torch.device:
        """Where the first offloaded layer computes."""
        device: torch.device = next(self.offloaded[0].module.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The model's compute dtype."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def rotary(
        self, like: torch.Tensor, position_ids: torch.Tensor, layer_type: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin ``[1, n, d]`` of the RoPE of one layer type, in the dtype of ``like``, in any family."""
        return _rotary(self.decoder, like, position_ids, layer_type)


def cache_keyword(model: PreTrainedModel) -> str:
    """The keyword by which transformers takes a cache: ``cache`` since 5.24, ``past_key_values`` before.

    The class of the decoder tells: the forward of ``model`` may be a wrapper that takes anything.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    forward = type(decoder if isinstance(decoder, nn.Module) else model).forward
    return "cache" if "cache" in signatures.signature(forward).parameters else "past_key_values"


def context_limit(model: PreTrainedModel) -> int | None:
    """Most tokens the model has positions for; None where it does not say.

    YaRN and its kin state the length they were stretched from and a factor; either product or
    ``max_position_embeddings`` is the longer one, by the custom of the checkpoint. Other factors add nothing: linear
    ones are contained in ``max_position_embeddings``, and those of dynamic NTK change the keys that are stored.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    given: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    rope = given.get("full_attention") or given
    if rope.get("rope_type") not in _STRETCHED or not isinstance(rope.get("factor"), int | float):
        return limit
    return max(limit, int(rope["factor"] * (rope.get("original_max_position_embeddings") or limit)))


def check_length(model: PreTrainedModel, tokens: int, label: str) -> None:
    """Raise InputError where the model has no positions for ``tokens``; ``label`` says whose they would be."""
    limit = context_limit(model)
    if limit is not None and tokens > limit:
        raise InputError(
            f"{label} would have {tokens:,} tokens, the model's limit is {limit:,}",
            hint="append less, or generate less",
        )


def check_token_ids(model: PreTrainedModel, ids: Iterable[int]) -> list[int]:
    """The ids as a list of int. Raises InputError where the model has no embedding for one of them."""
    try:
        found = [operator.index(each) for each in ids]
    except TypeError as error:
        raise InputError("token ids have to be whole numbers", hint="use the tokenizer of this model") from error
    embeddings = model.get_input_embeddings()
    vocabulary = getattr(embeddings, "num_embeddings", None) or model.config.get_text_config().vocab_size
    for position, each in enumerate(found):
        if not 0 <= each < vocabulary:
            raise InputError(
                f"token id {each} at position {position} is not one of the model's {vocabulary:,} (from 0 on)",
                hint="use the tokenizer of this model",
            )
    return found


def inspect(model: PreTrainedModel) -> ModelParts:
    """Find the parts of a decoder-only model. Raises ModelError where one is missing, or its file was changed."""
    name = type(model).__name__
    check_files(model)  # callers read weights next
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    modules = getattr(decoder, "layers", None)
    if decoder is None or not isinstance(modules, nn.ModuleList):
        raise ModelError(f"{name}: no decoder with a list of layers", hint="use a decoder-only causal language model")
    config = decoder.config
    kinds, layer_kwargs = get_layer_types_and_kwargs(config)
    _check_rope(name, decoder)
    layers = _layers(name, decoder, kinds)
    full = [part.attention for part in layers if part.order is not None]
    if not full:
        raise ModelError(
            f"{name}: no full-attention layer, only {', '.join(sorted(set(kinds)))}",
            hint="its cache does not grow with the context, so run it without kvswap"
            if not set(kinds) - _CONSTANT
            else "layers of that kind are not supported yet, so run it without kvswap",
        )
    shapes = {(a.q_proj.out_features // a.head_dim, a.k_proj.out_features // a.head_dim, a.head_dim) for a in full}
    if len(shapes) > 1 or len({a.scaling for a in full}) > 1:
        raise ModelError(f"{name}: full-attention layers differ in heads: {shapes}", hint="not supported yet")
    query_heads, kv_heads, head_dim = shapes.pop()
    return ModelParts(
        model=model,
        decoder=decoder,
        config=config,
        layers=layers,
        layer_kwargs=tuple(layer_kwargs),
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scaling=float(full[0].scaling),
    )


def check_placement(parts: ModelParts) -> None:
    """Raise ModelError where the layers are not in the memory of one device, or were compiled as they are."""
    name = type(parts.model).__name__
    modules: list[Any] = [parts.model, parts.decoder, *(part.module for part in parts.layers)]
    if any(hasattr(each, "_orig_mod") or getattr(each, "_compiled_call_impl", None) is not None for each in modules):
        raise ModelError(f"{name} is compiled, and compiled code keeps its attention", hint="attach it uncompiled")
    devices = {str(tensor.device) for part in parts.layers for tensor in part.module.parameters()}
    if "meta" in devices:
        raise ModelError(
            f"{name}: weights are not in memory but offloaded (device meta)",
            hint="load the whole model on one device, without device_map",
        )
    if len(devices) > 1:
        raise ModelError(
            f"{name}: its layers are on several devices: {', '.join(sorted(devices))}",
            hint="load the whole model on one device, without device_map",
        )


def _rotary(
    decoder: Any, like: torch.Tensor, position_ids: torch.Tensor, layer_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    typed = "layer_type" in signatures.signature(decoder.rotary_emb.forward).parameters
    cos, sin = decoder.rotary_emb(like, position_ids, *([layer_type] if typed else []))
    return cos, sin


def _check_rope(name: str, decoder: Any) -> None:
    """Refuse RoPE whose frequencies depend on what was asked before: stored keys would not fit later queries."""
    found = getattr(getattr(decoder, "rotary_emb", None), "rope_type", None)
    changing = {"dynamic": "dynamic NTK", "longrope": "longrope"}
    if kind := next((changing[each] for each in _each(found) if each in changing), None):
        raise ModelError(
            f"{name}: {kind} scaling of RoPE changes with the length of the context, and stored keys do not",
            hint='use another rope_type in config.json, such as "yarn" or "linear"',
        )


def _each(kinds: Any) -> list[Any]:
    return list(kinds.values()) if isinstance(kinds, dict) else [kinds]


def _rope_width(decoder: Any, layer_type: str, head_dim: int) -> int:
    """Elements of a head that RoPE turns: fewer than ``head_dim`` in some families."""
    try:
        device = next(decoder.rotary_emb.buffers()).device
        cos, _ = _rotary(
            decoder, torch.zeros(1, 1, 1, device=device), torch.ones(1, 1, device=device).long(), layer_type
        )
    except (AttributeError, RuntimeError, StopIteration, TypeError, ValueError):
        return head_dim  # the check at attach tells
    return int(cos.shape[-1])


def _layers(name: str, decoder: Any, kinds: list[str]) -> tuple[LayerParts, ...]:
    layers, order = [], 0
    fused_ropes = dict[Any, Any]()  # layers share them, and a trial takes milliseconds
    for index, (module, kind) in enumerate(zip(decoder.layers, kinds, strict=False)):
        offload = kind == "full_attention"
        attention = getattr(module, "self_attn", None)
        if offload:
            _check_layer(name, index, module, attention)
        family = sys.modules[type(attention).__module__] if attention is not None else None
        rope = getattr(family, "apply_rotary_pos_emb", None)
        if offload and rope is None:
            raise ModelError(f"{name}: its family has no apply_rotary_pos_emb", hint="only RoPE models are supported")
        fused = None
        if rope and attention is not None and (offload or kind == "sliding_attention"):
            same = rope, kind, attention.head_dim
            if same not in fused_ropes:
                fused_ropes[same] = fused_rope(rope, attention.head_dim, _rope_width(decoder, kind, attention.head_dim))
            fused = fused_ropes[same]
        norm = fused_norm(getattr(module, "input_layernorm", None))
        layers.append(LayerParts(index, order if offload else None, kind, module, attention, norm, fused))
        order += offload
    return tuple(layers)


def _check_layer(name: str, index: int, module: nn.Module, attention: Any) -> None:
    required = {"input_layernorm": module, "q_proj": attention, "k_proj": attention, "head_dim": attention}
    required["scaling"] = attention
    missing = [part for part, owner in required.items() if not hasattr(owner, part)]
    if missing:
        raise ModelError(
            f"{name}: decoder layer {index} has no {', '.join(missing)}",
            hint="families that work: Llama, Mistral, Qwen2, Qwen2.5, Qwen3, Gemma 3 and models built like them",
        )
    norm = getattr(attention, "q_norm", None)
    weight = getattr(norm, "weight", None)
    if weight is not None and weight.numel() != attention.head_dim:
        raise ModelError(f"{name}: q_norm of layer {index} is not per head", hint="this family is not supported yet")
