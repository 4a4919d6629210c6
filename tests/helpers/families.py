"""Tiny random models, one a family, and the runs that every law needs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

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


def full_cache(model: PreTrainedModel) -> DynamicCache:
    """transformers' own cache in memory."""
    return DynamicCache(config=model.config)
