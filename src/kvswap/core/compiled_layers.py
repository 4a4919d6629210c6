"""Which decoder layers can take a token in compiled calls, and the proof that these compute the same.

``describe`` recognises a layer by its structure: input norm, linear q, k, v and o with optional biases and norms of q
and k, a gated MLP, optional norms after attention and MLP. Nothing is believed by a name alone: norms and activation
are tried out, and ``prove`` sends a token of two sequences through every such layer of an attached model, once through
its modules and once compiled. Layers that differ, and all others, take the path of ``core/decode.py``, which is the
specification. Called at attach, by the thread that attaches; ``core/compiled_step.py`` uses the result.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, field
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from kvswap.core.layer_major import AttentionInput, LayerForward, LayerMajorCache
from kvswap.core.model_patch import Attachment
from kvswap.core.prediction_check import Passing, Through, send_through, trial_position
from kvswap.errors import KVSwapError
from kvswap.models.adapter import LayerParts, ModelParts
from kvswap.models.fused import norm_form, rotate_halves
from kvswap.native import step_loops
from kvswap.native.step_loops import (
    BFLOAT16,
    FLOAT32,
    GELU_TANH,
    SILU,
    TYPES,
    Layer,
    Linear,
    Norm,
    Scratch,
    Slots,
)
from kvswap.native.weight_loops import Matrix, multiplies

_log = logging.getLogger("kvswap")

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Most that the two may differ in what a layer adds to the hidden state, as a share of that, by the model's dtype."""
PACKED_BOUND = 3e-2
"""The same for weights of a few bits: vectors are rounded for them, and now and then one is rounded the other way."""
_BATCH, _TOKENS, _GROUP_TOKENS = 2, 10, 4
_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_NORMS = {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"}
_LAYER = {"self_attn", "mlp", *_NORMS}


class _NotKnownError(Exception):
    """A layer is built in another way; the message says what of it."""


@dataclass(slots=True)
class CompiledLayers:
    """The layers of one model that take a token in compiled calls, by index. ``keeps`` is what they point to.

    ``joined`` tells that these are all, and that the model gives each of them the output of the one before, and the
    same arguments, but for the RoPE of its type.
    """

    layers: dict[int, Layer] = field(default_factory=dict)
    joined: bool = False
    keeps: list[torch.Tensor] = field(default_factory=list)
    watched: list[dict[str, Any]] = field(default_factory=list)
    expected: list[Any] = field(default_factory=list)

    def unchanged(self) -> bool:
        """Whether no module, weight or hook of these layers was replaced or added since."""
        found = chain.from_iterable(map(dict.values, self.watched))  # at every step, so nothing of it is Python
        return sum(map(len, self.watched)) == len(self.expected) and all(map(is_, found, self.expected))


def describe(parts: ModelParts) -> CompiledLayers:
    """Describe all layers that are built as the compiled calls expect; the reason for others is logged."""
    found = CompiledLayers()
    if not step_loops.available() or parts.device.type != "cpu" or parts.dtype not in BOUNDS:
        return found
    for part in parts.layers:
        if part.order is None and part.layer_type != "sliding_attention":
            continue
        try:
            found.layers[part.index] = _Description(part, parts, found).layer
        except _NotKnownError as error:
            _log.debug("layer %d is not compiled: %s", part.index, error)
    modules = [module for index in found.layers for module in parts.layers[index].module.modules()]
    for module in modules:
        names = ("_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks")
        found.watched += [module.__dict__[name] for name in names]
    found.expected = [each for attributes in found.watched for each in attributes.values()]
    return found


class _Description:
    """One decoder layer as the compiled calls take it. Raises _NotKnownError."""

    def __init__(self, part: LayerParts, parts: ModelParts, found: CompiledLayers) -> None:
        module, attention = part.module, part.attention
        mlp: Any = getattr(module, "mlp", None)
        self._keeps = found.keeps
        _check_module(module, _LAYER, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
        _check_module(attention, _ATTENTION, {"q_proj", "k_proj", "v_proj", "o_proj"})
        _check_module(mlp, _MLP, {"gate_proj", "up_proj", "down_proj"})
        if part.rope is not rotate_halves:
            raise _NotKnownError("another kind of RoPE")
        sandwich = "pre_feedforward_layernorm" in module._modules
        if sandwich != ("post_feedforward_layernorm" in module._modules):
            raise _NotKnownError("norms in other places")
        after = module.post_attention_layernorm
        self.layer = Layer(
            hidden=attention.q_proj.in_features,
            heads=attention.q_proj.out_features // attention.head_dim,
            kv_heads=attention.k_proj.out_features // attention.head_dim,
            head_dim=attention.head_dim,
            inner=mlp.gate_proj.out_features,
            activation=_activation(mlp.act_fn, parts.dtype),
            scaling=attention.scaling,
            input=self._norm(module.input_layernorm),
            q_norm=self._norm(getattr(attention, "q_norm", None)),
            k_norm=self._norm(getattr(attention, "k_norm", None)),
            after_attention=self._norm(after if sandwich else None),
            before_mlp=self._norm(module.pre_feedforward_layernorm if sandwich else after),
            after_mlp=self._norm(module.post_feedforward_layernorm if sandwich else None),
            **{name: self._linear(getattr(attention, f"{name}_proj")) for name in ("q", "k", "v", "o")},
            **{name: self._linear(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down")},
        )
        self._check_shapes()

    def _norm(self, norm: Any) -> Norm:
        if norm is None:
            return Norm()
        form = norm_form(norm)
        if form is None:
            raise _NotKnownError(f"a norm of its own, {type(norm).__name__}")
        return Norm(self._float(norm.weight), form.offset, form.eps)

    def _linear(self, linear: Any) -> Linear:
        given = getattr(linear, "matrix", None)
        if isinstance(given, Matrix) and multiplies(given.type):
            matrix = given
            self._keeps.append(linear.weight)
        elif type(linear) is nn.Linear and linear.weight.dtype in (torch.float32, torch.bfloat16):
            weight = linear.weight.detach()
            if not weight.is_contiguous() or weight.device.type != "cpu":
                raise _NotKnownError("a weight that is not contiguous")
            self._keeps.append(weight)
            matrix = Matrix(
                weight.data_ptr(), TYPES[weight.dtype], *weight.shape, weight.stride(0) * weight.itemsize, 0
            )
        else:
            raise _NotKnownError(f"a linear module of its own, {type(linear).__name__}")
        return Linear(matrix, None if linear.bias is None else self._float(linear.bias))

    def _float(self, weight: torch.Tensor) -> int:
        """The address of a vector as float32, which is the module's own where it has that dtype."""
        vector = weight.detach().float().contiguous()
        self._keeps.append(vector)
        return vector.data_ptr()

    def _check_shapes(self) -> None:
        layer = self.layer
        queries, keys = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        for name, shape in (
            *(("q", (queries, layer.hidden)), ("k", (keys, layer.hidden)), ("v", (keys, layer.hidden))),
            *(("o", (layer.hidden, queries)), ("down", (layer.hidden, layer.inner))),
            *(("gate", (layer.inner, layer.hidden)), ("up", (layer.inner, layer.hidden))),
        ):
            matrix = getattr(layer, name).matrix
            if (matrix.rows, matrix.columns) != shape:
                raise _NotKnownError(f"{name} is {matrix.rows} x {matrix.columns}")


def _check_module(module: Any, known: set[str], required: set[str]) -> None:
    """Refuse a module with other children than ``known``, or with parameters or hooks of its own."""
    if not isinstance(module, nn.Module):
        raise _NotKnownError("no MLP, or no attention")
    children = {name for name, child in module._modules.items() if child is not None}
    if not required <= children <= known:
        raise _NotKnownError(f"{type(module).__name__} has {', '.join(sorted(children ^ required))}")
    if any(each is not None for each in module._parameters.values()) or module.training:
        raise _NotKnownError(f"{type(module).__name__} has parameters of its own, or is being trained")
    for each in (module, *(child for child in module._modules.values() if child is not None)):
        if each._forward_hooks or each._forward_pre_hooks:
            raise _NotKnownError(f"{type(each).__name__} has hooks")


@torch.no_grad()
def _activation(function: Any, dtype: torch.dtype) -> int:
    """The number of an activation, found by a trial."""
    trial = torch.linspace(-6, 6, 97)
    known = ((SILU, functional.silu(trial)), (GELU_TANH, functional.gelu(trial, approximate="tanh")))
    found = function(trial)
    for number, expected in known:
        if torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
            return number
    raise _NotKnownError("another activation")


_proved: weakref.WeakKeyDictionary[nn.Module, tuple[list[Any], CompiledLayers]] = weakref.WeakKeyDictionary()
"""By decoder: its state when its layers were tried, and those that gave what their modules give."""


def compiled_layers(attachment: Attachment) -> CompiledLayers:
    """The layers of an attached model that give compiled what their modules give.

    They are described and tried once, and again where the model is not what it was then.
    """
    decoder, state = attachment.parts.decoder, attachment.state
    known = _proved.get(decoder)
    if state is not None and known is not None and known[0] == state:
        return known[1]
    found = describe(attachment.parts)
    prove(attachment.parts, attachment.implementation, found)
    if state is not None:
        _proved[decoder] = state, found
    return found


@torch.no_grad()
def prove(parts: ModelParts, implementation: str, found: CompiledLayers) -> None:
    """Take those layers out of ``found`` that do not give what their modules give. The model is attached."""
    if not found.layers:
        return
    try:
        send_through(parts, _Proof(parts, implementation, found), _BATCH)
    except (ArithmeticError, KVSwapError, RuntimeError, TypeError, ValueError) as error:
        _log.debug("no layer is compiled: %s", error)
        found.layers.clear()
    found.joined = found.joined and len(found.layers) == len(parts.layers)


class _Stored(Passing):
    """A layer that holds some random tokens."""

    def __init__(self, parts: ModelParts) -> None:
        super().__init__(trial_position(parts))
        generator = torch.Generator().manual_seed(11)
        shape = _BATCH, parts.kv_heads, _TOKENS - 1, parts.head_dim
        self.stored = [torch.randn(shape, generator=generator).to(parts.dtype) for _ in range(2)]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Give what is stored and what came."""
        return torch.cat((self.stored[0], key_states), 2), torch.cat((self.stored[1], value_states), 2)


class _Proof(LayerMajorCache):
    """Claims to hold some tokens, and sends the newest one of each sequence through modules and compiled calls."""

    def __init__(self, parts: ModelParts, implementation: str, found: CompiledLayers) -> None:
        layers = [_Stored(parts) for _ in parts.layers]
        super().__init__(parts, implementation, layers, chunk_tokens=512, on_progress=None)
        self._found = found
        self._plain = found.joined = True
        self._before: tuple[torch.Tensor, int, dict[str, Any]] | None = None
        self._ropes: dict[str, Any] = {}  # by type of layer

    def run_layer(self, part: LayerParts, forward: LayerForward, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        """Run one layer in both ways, and go on with the result of its modules."""
        layer = self._found.layers.get(part.index)
        self._found.joined = self._found.joined and self._is_handed_on(part, hidden, kwargs)
        if layer is not None:
            self._plain = True
            expected = forward(hidden, **{**kwargs, "attention_mask": None})
            difference = self._difference(part, layer, hidden, expected, kwargs) if self._plain else float("inf")
            if not difference <= _bound(layer, self.parts.dtype):
                _log.debug("layer %d is not compiled: its output differs by %.2g", part.index, difference)
                del self._found.layers[part.index]
            hidden = expected
        elif kwargs["kvswap_call"] is not None:
            kwargs["kvswap_call"].attended = True  # by nobody: it is not looked at
        if part.index == len(self.parts.layers) - 1:
            raise Through
        self._before = hidden, hidden._version, kwargs
        return hidden

    def attention(self, given: AttentionInput) -> torch.Tensor:
        """The model's own attention, if it is nothing but softmax(QK)V."""
        self._plain = not given.special
        return super().attention(given)

    def attention_in_memory(self, given: AttentionInput) -> torch.Tensor:
        """The same for a layer that stays in memory."""
        self._plain = not given.special
        return super().attention_in_memory(given)

    def _is_handed_on(self, part: LayerParts, hidden: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether ``part`` gets what the layer before gave, with the same arguments, and the RoPE of its type."""
        rope, first = kwargs["position_embeddings"], not self._ropes
        if part.layer_type not in self._ropes:
            self._ropes[part.layer_type] = rope
            if not first:
                expected = self.parts.rotary(hidden, kwargs["position_ids"], part.layer_type)
                return self._is_next(hidden, kwargs) and all(map(torch.equal, rope, expected))
        return self._is_next(hidden, kwargs) and _is_one(rope, self._ropes[part.layer_type])

    def _is_next(self, hidden: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        if self._before is None:
            return True
        output, version, arguments = self._before
        return hidden is output and hidden._version == version and _same(kwargs, arguments)

    def _difference(
        self, part: LayerParts, layer: Layer, hidden: torch.Tensor, expected: torch.Tensor, kwargs: dict[str, Any]
    ) -> float:
        """How far compiled output and query are from those of the modules, as a share of what the layer adds."""
        cos, sin = kwargs["position_embeddings"]
        batch, groups = len(hidden), -(-_TOKENS // _GROUP_TOKENS)
        scratch = Scratch([layer], batch, hidden.dtype)
        scratch.use_rope(cos.float(), sin.float(), layer.head_dim)
        query, predicted = scratch.query(layer, hidden), part.predict_query(hidden, cos, sin).float()
        data, slots = self._slots(part, batch, groups)
        index, offset = np.arange(batch * groups).reshape(batch, groups), np.full(batch, (_TOKENS - 1) % _GROUP_TOKENS)
        scratch.begin(layer, hidden, slots, np.ascontiguousarray(index[:, -1]), offset)
        output = scratch.finish(layer, hidden, slots, index, None, offset)
        del data
        added = (expected.float() - hidden.float()).norm()
        return max(
            float((output.float() - expected.float()).norm() / added),
            float((query - predicted).norm() / predicted.norm()),
        )

    def _slots(self, part: LayerParts, batch: int, groups: int) -> tuple[torch.Tensor, Slots]:
        """K, V that the layer's cache gave, in slots, without those of the newest token."""
        keys, values = (each.float() for each in self.layers[part.index].stored)
        data = torch.zeros(batch, groups, 2, keys.shape[1], _GROUP_TOKENS, keys.shape[3])
        for kind, stored in enumerate((keys, values)):
            padded = functional.pad(stored, (0, 0, 0, groups * _GROUP_TOKENS - stored.shape[2]))
            data[:, :, kind] = padded.unflatten(2, (groups, _GROUP_TOKENS)).transpose(1, 2)
        size_bytes = data[0, 0].nbytes
        return data, Slots(data.data_ptr(), batch * groups, size_bytes, TYPES[torch.float32], _GROUP_TOKENS)


def _same(arguments: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether two layers get the same, but for masks, which compiled calls do not need, RoPE, and what kvswap adds."""
    names = (set(arguments) | set(others)) - {"attention_mask", "kvswap_call", "position_embeddings"}
    return all(_is_one(arguments.get(name), others.get(name)) for name in names)


def _is_one(value: Any, other: Any) -> bool:
    if isinstance(value, tuple) and isinstance(other, tuple):
        return len(value) == len(other) and all(map(_is_one, value, other))
    return value is other


def _bound(layer: Layer, dtype: torch.dtype) -> float:
    plain = all(getattr(layer, name).matrix.type in (FLOAT32, BFLOAT16) for name in _MATRICES)
    return BOUNDS[dtype] if plain else max(BOUNDS[dtype], PACKED_BOUND)
