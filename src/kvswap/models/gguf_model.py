"""A model made of a GGUF file as it is: matrices stay packed and mapped, configuration and tokenizer are the file's.

``loading`` calls this for the architectures in ``ARCHITECTURES``; ``gguf`` converts files of others. The class of the
model is that of transformers, made without memory and filled tensor by tensor. Nothing beside the file is looked at.
One thread.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from kvswap.errors import ModelError
from kvswap.models.empty_model import check_filled, empty_model, place_packed
from kvswap.models.gguf_rope import rope_scaling
from kvswap.models.gguf_tokenizer import tokenizer_of
from kvswap.models.loading_info import count_of, some_of
from kvswap.native.weight_loops import multiplies
from kvswap.units import format_bytes
from kvswap.weights.gguf_file import TYPES, GgufFile, Tensor
from kvswap.weights.modules import PackedEmbedding, PackedLinear, dequantise, from_pairs, unpack_rows, unpacked_type

_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "rope.freq_base": "rope_theta",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
}
_NEEDED = ("context_length", "block_count", "feed_forward_length", "embedding_length", "attention.head_count")
_COUNTS = (*_NEEDED, "attention.head_count_kv", "attention.key_length", "rope.dimension_count")
_NUMBERS = ("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.freq_base_swa")
_MOST = 1 << 31
"""No count of the metadata reaches this."""
ARCHITECTURES = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
"""Architectures that run as they are, by the format's name, and the model type of transformers."""
_ROTATED_IN_PAIRS = ("llama", "mistral")
"""Whose q and k rows the format has in the order of pairs, where transformers has halves."""
_NORMS_PLUS_ONE = ("gemma3",)
"""Whose norms the format has with the one that transformers adds."""
_GEMMA3_27B_LAYERS = 62

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3_NAMES = {
    **_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_WITHOUT_WEIGHTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are not weights: RoPE takes them."""


def runs_as_it_is(file: GgufFile) -> bool:
    """Whether this file's architecture is one that runs without a conversion."""
    return file.architecture in ARCHITECTURES and f"{file.architecture}.expert_count" not in file.metadata


def unpacked_bytes(tensor: Tensor) -> int:
    """Memory that a tensor takes because its type has no compiled products; 0 where it stays as the file has it."""
    if len(tensor.shape) < 2 or multiplies(tensor.type):
        return 0
    return prod(tensor.shape) * TYPES[unpacked_type(tensor.type)][2]


def load_packed(file: GgufFile, notice: Callable[[str], None]) -> tuple[PreTrainedModel, Any]:
    """The model and its tokenizer. Raises ModelError where the file lacks something or has something unknown."""
    values = _values(file)
    rotated = _stated(file).get("rope.dimension_count", values["head_dim"])
    if rotated != values["head_dim"]:
        raise ModelError(
            f"model {file.path}: RoPE turns {rotated} of a head's {values['head_dim']} elements",
            hint="give the model directory it was made from",
        )
    model = _empty_model(file, values, notice)
    _fill(model, file, notice)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return model, tokenizer_of(file)


def _empty_model(file: GgufFile, values: dict[str, Any], notice: Callable[[str], None]) -> PreTrainedModel:
    """The model without memory, of a configuration with these values."""
    try:
        return empty_model(AutoConfig.for_model(ARCHITECTURES[file.architecture], **values), notice)
    except Exception as error:  # what transformers checks has errors of its own, of no common class
        raise ModelError(
            f"model {file.path}: its metadata makes no model: {' '.join(str(error).split())[:200].rstrip('.')}",
            hint="fetch it again, or give the model directory it was made from",
        ) from error


def check_metadata(file: GgufFile) -> None:
    """Raise ModelError for counts that no model has or can be made of, before anything is made of them."""
    layers, tensors = file.metadata.get(f"{file.architecture}.block_count"), len(file.tensors)
    if isinstance(layers, int) and layers > tensors:  # a damaged number must not make millions of layers
        raise _contradiction(file, f"{layers:,} layers and {tensors:,} tensors")
    if runs_as_it_is(file):
        _check_stated(file, _stated(file))


def check_shapes(file: GgufFile) -> None:
    """Raise ModelError where tensors are missing or do not fit the metadata, before a model of such sizes is made."""
    _matching(file, _shapes(_empty_model(file, _values(file), _nothing)), _nothing)


def _nothing(text: str) -> None:
    """Pass over a notice."""


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters by name, tied ones once."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _stated(file: GgufFile) -> dict[str, Any]:
    """The metadata by key without the architecture."""
    return {key.removeprefix(f"{file.architecture}."): value for key, value in file.metadata.items()}


def _values(file: GgufFile) -> dict[str, Any]:
    """Values of the configuration, from the file's metadata."""
    architecture, tensors, stated = file.architecture, file.tensors, _stated(file)
    missing = [f"{architecture}.{key}" for key in _NEEDED if key not in stated]
    missing += ["token_embd.weight"] * ("token_embd.weight" not in tensors)
    if missing:
        raise ModelError(
            f"model {file.path}: the GGUF file lacks {', '.join(missing)}", hint="it is incomplete: fetch it again"
        )
    values = {name: stated[key] for key, name in _KEYS.items() if key in stated}
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    _check_heads(file, values["num_attention_heads"], values["num_key_value_heads"], values["head_dim"])
    values["vocab_size"] = tensors["token_embd.weight"].shape[0]
    values["tie_word_embeddings"] = "output.weight" not in tensors
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        values[f"{name}_token_id"] = _token_id(file, f"tokenizer.ggml.{key}_token_id", values["vocab_size"])
    values |= _of_family(architecture, stated, tensors, values)
    rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta", 10000.0)}
    rope |= rope_scaling(file, values["head_dim"], rope["rope_theta"])
    values["rope_parameters"] = rope
    if architecture == "gemma3":  # sliding layers have a RoPE of their own, which no file states
        local = {"rope_type": "default", "rope_theta": stated.get("rope.freq_base_swa", 10000.0)}
        values["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    return values


def _check_stated(file: GgufFile, stated: dict[str, Any]) -> None:
    """Raise ModelError where the metadata has a value that no model has. Nothing is allocated by it before."""
    for keys, kinds, most in ((_COUNTS, int, _MOST), (_NUMBERS, int | float, math.inf)):
        for key in stated.keys() & set(keys):
            value = stated[key]
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < most:  # NaN is not, either
                shown = f"{len(value)} values" if isinstance(value, list) else f"{value!r}"[:40]
                raise ModelError(
                    f"model {file.path}: {file.architecture}.{key} is {shown}, which does not run here",
                    hint="fetch it again, or give the model directory it was made from",
                )


def _check_heads(file: GgufFile, heads: int, kv_heads: int, head_dim: int) -> None:
    """Raise ModelError for heads that no model has. Sizes that only do not fit a tensor are found later."""
    if heads % kv_heads:
        raise _contradiction(file, f"{heads:,} query heads for {kv_heads:,} key heads")
    if head_dim < 2 or head_dim % 2:
        raise _contradiction(file, f"heads of {head_dim:,} elements")


def _contradiction(file: GgufFile, what: str) -> ModelError:
    return ModelError(f"model {file.path}: the GGUF file contradicts itself: it states {what}", hint="fetch it again")


def _token_id(file: GgufFile, key: str, size: int) -> int | None:
    """A token of the metadata, such as that of the end. Raises ModelError where the vocabulary does not have it."""
    found = file.metadata.get(key)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < size:
        raise ModelError(
            f"model {file.path}: {key} is {f'{found!r}'[:40]}, which is none of its {size:,} tokens",
            hint="fetch it again",
        )
    return found


def _of_family(
    architecture: str, stated: dict[str, Any], tensors: dict[str, Tensor], values: dict[str, Any]
) -> dict[str, Any]:
    """What only some architectures have."""
    if architecture in ("llama", "qwen3"):
        return {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_gate.bias" in tensors}
    window = stated.get("attention.sliding_window")
    if architecture == "mistral":
        return {"sliding_window": window or None}
    if architecture == "gemma3":
        heads, layers = values["num_attention_heads"], values["num_hidden_layers"]
        wide = values["hidden_size"] // heads if layers == _GEMMA3_27B_LAYERS else values["head_dim"]
        return {"query_pre_attn_scalar": wide, "sliding_window": 512 if window is None else window}
    return {}


def _fill(model: PreTrainedModel, file: GgufFile, notice: Callable[[str], None]) -> None:
    """Put the file's tensors into the model."""
    shapes = _shapes(model)
    given = _matching(file, shapes, notice)
    for name, shape in shapes.items():
        if len(shape) > 1:
            _place_matrix(model, name.removesuffix(".weight"), given, file.architecture)
    for name, shape in shapes.items():
        if len(shape) == 1:
            _place_vector(model, name, given[name], file.architecture)
    if model.config.tie_word_embeddings:
        table = cast(PackedEmbedding, model.get_input_embeddings())
        place_packed(model, "lm_head", table.weight, table.kind, None, columns=table.embedding_dim, fine=True)
    check_filled(model, "give the model directory it was made from")


def _matching(file: GgufFile, shapes: dict[str, tuple[int, ...]], notice: Callable[[str], None]) -> dict[str, Tensor]:
    """The file's tensors by the model's names. Missing ones and wrong shapes are errors, unused ones are named."""
    given = {_module_name(file.architecture, name): tensor for name, tensor in file.tensors.items()}
    given.pop("", None)
    if missing := sorted(set(shapes) - set(given)):
        instead = sorted(set(given) - set(shapes))
        raise ModelError(
            f"model {file.path}: its weights lack {count_of(missing)}: {some_of(missing)}"
            + (f"; it has {some_of(instead)} instead" if instead else ""),
            hint="the file is incomplete or of another family than it says: fetch it again",
        )
    if unused := sorted(set(given) - set(shapes)):
        notice(f"model {file.path}: {count_of(unused)} of its weights not used: {some_of(unused)}")
    for name, shape in shapes.items():
        if given[name].shape != shape:
            raise ModelError(
                f"model {file.path}: tensor {given[name].name} has shape {given[name].shape}, not {shape}",
                hint="its tensors do not fit its metadata: fetch it again",
            )
    if others := [given[name] for name in shapes if unpacked_bytes(given[name])]:
        types, taken_bytes = sorted({each.type_name for each in others}), sum(map(unpacked_bytes, others))
        notice(
            f"model {file.path}: weights of type {', '.join(types)} have no compiled products, so they are unpacked "
            f"now and take {format_bytes(taken_bytes)} of memory"
        )
    return given


def _module_name(architecture: str, name: str) -> str:
    """The model's name for a tensor; empty for what is no weight."""
    if name in _WITHOUT_WEIGHTS:
        return ""
    names = _GEMMA3_NAMES if architecture == "gemma3" else _NAMES
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", name)
    if block is not None and block[2] in names:
        return f"model.layers.{block[1]}.{names[block[2]]}.{block[3]}"
    stem, _, ending = name.rpartition(".")
    return f"{names[stem]}.{ending}" if stem in names else name


def _place_matrix(model: PreTrainedModel, path: str, given: dict[str, Tensor], architecture: str) -> None:
    """Put a packed layer in the place of one. The output layer is fine: its rounding alone would double the KL."""
    old, tensor = model.get_submodule(path), given[f"{path}.weight"]
    if unpacked_bytes(tensor):
        rows = unpack_rows(tensor.data, tensor.type, tensor.shape[1])
        tensor = replace(tensor, type=unpacked_type(tensor.type), data=rows)
    pairs = model.config.head_dim if architecture in _ROTATED_IN_PAIRS and path.endswith(("q_proj", "k_proj")) else 0
    bias = given.get(f"{path}.bias") if getattr(old, "bias", None) is not None else None
    values = None if bias is None else _vector(bias)
    if values is not None and pairs:
        values = values[from_pairs(len(values), pairs)]
    weight, fine = nn.Parameter(tensor.data, requires_grad=False), path == "lm_head"
    place_packed(model, path, weight, tensor.type, values, columns=tensor.shape[1], paired_rows=pairs, fine=fine)


def _place_vector(model: PreTrainedModel, name: str, tensor: Tensor, architecture: str) -> None:
    path, _, ending = name.rpartition(".")
    values = _vector(tensor)
    if architecture in _NORMS_PLUS_ONE and name.endswith("norm.weight"):
        values = values - 1
    owner = model.get_submodule(path)
    if isinstance(owner, PackedLinear):
        return
    setattr(owner, ending, nn.Parameter(values, requires_grad=False))


def _vector(tensor: Tensor) -> torch.Tensor:
    return dequantise(tensor.data, tensor.type).reshape(-1).clone()
