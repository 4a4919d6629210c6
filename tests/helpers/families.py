"""Tiny random models, one a family, and the runs that every law needs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.errors import MemoryBudgetError
from kvswap.models.adapter import cache_keyword

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3")
VOCABULARY = 128

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
}
_CLASSES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {}),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": None}),
    "gemma3": (
        transformers.Gemma3TextConfig,
        transformers.Gemma3ForCausalLM,
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 64,
        },
    ),
}


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random float32 model of a family, the same one at every call."""
    config_class, model_class, extra = _CLASSES[family]
    torch.manual_seed(7)
    config = config_class(
        **{**_SHAPE, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None, **extra, **changes}
    )
    model: PreTrainedModel = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):  # zero or one at birth, which hides mistakes
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
_DELTA_NET = {
    **_LINEAR,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MATFORMER = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}

OTHER_FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    # name: model type, changes, and "" where attach takes it, else a part of the reason why not
    "arcee": ("arcee", {}, ""),
    "bitnet": ("bitnet", {}, ""),
    "cohere": ("cohere", {}, ""),
    "cwm": ("cwm", {**_SLIDING, "bos_token_id": 1, "eos_token_id": 2}, ""),
    "ernie 4.5": ("ernie4_5", {}, ""),
    "gemma": ("gemma", {}, ""),
    "gemma 2 (softcap)": ("gemma2", {**_SLIDING, "attn_logit_softcapping": 0.003}, ""),
    "glm": ("glm", {}, ""),
    "glm 4": ("glm4", {}, ""),
    "glm 4 moe (partial rope)": (
        "glm4_moe",
        {"first_k_dense_replace": 4, "rope_parameters": {**_PLAIN_ROPE, "partial_rotary_factor": 0.5}},
        "",
    ),
    "gpt-oss (sinks)": ("gpt_oss", {**_SLIDING, "num_local_experts": 4, "rope_parameters": _PLAIN_ROPE}, ""),
    "granite": ("granite", {}, ""),
    "granite_swa": ("granite_swa", _SLIDING, ""),
    "helium": ("helium", {}, ""),
    "laguna (gated)": ("laguna", {}, ""),
    "ministral": ("ministral", _SLIDING, ""),
    "mixtral": ("mixtral", {}, ""),
    "nanochat": ("nanochat", {}, ""),
    "olmo": ("olmo", {}, ""),
    "seed-oss": ("seed_oss", {}, ""),
    "smollm3 (all rope)": ("smollm3", {"no_rope_layers": [1] * 4}, ""),
    "starcoder2 (layer norm)": ("starcoder2", {}, ""),
    "vaultgemma": ("vaultgemma", _SLIDING, ""),
    "afmoe (no rope)": ("afmoe", {**_SLIDING, **_EXPERTS, "num_dense_layers": 4}, "cosine"),
    "cohere 2 (no rope)": ("cohere2", _SLIDING, "cosine"),
    "exaone-moe (no rope)": ("exaone_moe", {**_SLIDING, **_EXPERTS, "mlp_layer_types": ["dense"] * 4}, "cosine"),
    "hunyuan (norm after rope)": ("hunyuan_v1_dense", {}, "cosine"),
    "olmo (clipped)": ("olmo", {"clip_qkv": 0.02}, "cosine"),
    "smollm3 (no rope in layer 3)": ("smollm3", {}, "layer 3 computes another query .*cosine"),
    "diffllama": ("diffllama", {}, "changes keys or values"),
    "doge": ("doge", {}, "mask of its own"),
    "nemotron": ("nemotron", {}, "no keyword arguments"),
    "phi (partial rope)": ("phi", {}, "layer 0 cannot run"),
    "stablelm (partial rope)": ("stablelm", {}, "layer 0 cannot run"),
    "gemma 3n": (
        "gemma3n_text",
        {**_SLIDING, **_MATFORMER, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4},
        "layer 0 cannot run",
    ),
    "gemma 4": ("gemma4_text", {**_SLIDING, **_MATFORMER, "global_head_dim": 16}, "layer 0 cannot run"),
    "bamba": ("bamba", {"attn_layer_indices": [1, 3], **_MAMBA}, "mask of another kind"),
    "granite 4": (
        "granitemoehybrid",
        {"layer_types": ["mamba", "attention"] * 2, **_MAMBA, "num_local_experts": 2, "num_experts_per_tok": 1},
        "mask of another kind",
    ),
    "jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}, "mask of another kind"),
    "qwen3-next": ("qwen3_next", {**_DELTA_NET, "num_experts": 0}, "mask of another kind"),
    "qwen3.5": ("qwen3_5_text", _DELTA_NET, "mask of another kind"),
    "exaone 4": ("exaone4", _SLIDING, "has no input_layernorm"),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, "has no input_layernorm"),
    "olmo 2": ("olmo2", {}, "has no input_layernorm"),
    "olmo 3": ("olmo3", _SLIDING, "has no input_layernorm"),
    "phi 3 (fused)": ("phi3", {}, "has no q_proj"),
    "llama (dynamic rope)": (
        "llama",
        {"rope_parameters": {**_PLAIN_ROPE, "rope_type": "dynamic", "factor": 4.0}},
        "NTK",
    ),
    "llama (longrope)": (
        "llama",
        {
            "rope_parameters": {
                **_PLAIN_ROPE,
                "rope_type": "longrope",
                "factor": 4.0,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 64,
            }
        },
        "longrope scaling",
    ),
}


def other_model(name: str) -> PreTrainedModel:
    """A random float32 model of one of OTHER_FAMILIES, the same one at every call."""
    kind, changes, _ = OTHER_FAMILIES[name]
    torch.manual_seed(7)
    size = {**_SHAPE, "num_hidden_layers": 4, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None, **changes}
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **size)
    ).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # zero or one at birth, which hides mistakes
            parameter.data += 0.3 * torch.randn_like(parameter)
        if name.endswith("sinks"):  # or they take next to nothing beside hundreds of tokens
            parameter.data += 4.0
    return model


class Letters:
    """A tokenizer for the tiny vocabulary."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(letter) % 127 for letter in text[:3000]]}


def tokens(batch: int, count: int, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[batch, count]`` without the padding token."""
    return torch.randint(1, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def forced_logits(
    model: PreTrainedModel, ids: torch.Tensor, forced: torch.Tensor, cache: Any, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits ``[1 + forced, B, V]`` after the prompt and after each forced token, as generate would call the model."""

    def call(chunk: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, -chunk.shape[1] :]
        output = model(
            input_ids=chunk, attention_mask=mask, position_ids=positions, use_cache=True, **given(model, cache)
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    logits = [call(ids, mask)]
    for column in forced.unbind(1):
        if mask is not None:
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
        logits.append(call(column[:, None], mask))
    return torch.stack(logits)


def given(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """The cache as a keyword argument, by the name that this version of transformers uses."""
    return {cache_keyword(model): cache}


def least_memory(model: PreTrainedModel, config: Config, ids: torch.Tensor) -> int:
    """The smallest ``kv_memory`` under which a prompt works: no slot is left for reuse, so that every step reads."""
    with attach(model, config.replace(kv_memory="4KiB")) as cache, torch.no_grad():
        try:
            model(ids, use_cache=True, **given(model, cache))
        except MemoryBudgetError as error:
            return error.minimum_bytes
    raise AssertionError("it works with next to nothing")


def full_cache(model: PreTrainedModel) -> DynamicCache:
    """transformers' own cache in memory."""
    return DynamicCache(config=model.config)
