"""Models of transformers that are made without memory for their weights, to be filled with those of a packed file.

``gguf_model`` and ``packed_checkpoint`` make and fill them. One thread: while a model is made, PyTorch's
``Module.register_parameter`` is replaced for all modules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvswap.errors import ModelError
from kvswap.models.loading_info import some_of
from kvswap.weights.modules import PackedEmbedding, PackedLinear

T = TypeVar("T")


def empty_model(config: Any, notice: Callable[[str], None]) -> PreTrainedModel:
    """A float32 model whose parameters are on the device meta. Its buffers are made, as its family computes them."""

    def make(attention: str) -> PreTrainedModel:
        with _parameters_without_memory():
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention
            )

    return sdpa_or_eager(make, notice)


def sdpa_or_eager(make: Callable[[str], T], notice: Callable[[str], None]) -> T:
    """What ``make`` gives with sdpa attention, or with eager in families without it."""
    try:
        return make("sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
    notice("this family has no sdpa attention: its eager attention is used, which needs more memory")
    return make("eager")


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Within, a parameter goes to the device meta as soon as a module has it; buffers stay where they are."""
    register = nn.Module.register_parameter

    def without_memory(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def place_packed(
    model: PreTrainedModel,
    path: str,
    weight: nn.Parameter,
    kind: int,
    bias: torch.Tensor | None,
    *,
    columns: int,
    paired_rows: int = 0,
    fine: bool = False,
) -> None:
    """Put a packed layer in the place of a linear layer or embedding; arguments are those of ``PackedLinear``."""
    old = model.get_submodule(path)
    if isinstance(old, nn.Embedding):
        scale = float(getattr(old, "scalar_embed_scale", 1.0))
        new: nn.Module = PackedEmbedding(weight, kind, columns, scale=scale, padding_idx=old.padding_idx)
    else:
        new = PackedLinear(weight, kind, columns, bias, paired_rows=paired_rows, fine=fine)
    model.set_submodule(path, new.train(False))


def check_filled(model: PreTrainedModel, hint: str) -> None:
    """Raise ModelError where a tensor was not filled."""
    left = [
        name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.device.type == "meta"
    ]
    if left:
        raise ModelError(f"model {type(model).__name__}: nothing fills {some_of(sorted(left))}", hint=hint)
