"""Whether a model with packed layers computes what the same weights compute unpacked, in the code of its family.

Some families use weights in other ways than by calling their layers: as operands of their own products, or for their
dtype. Such a model would fail later, or compute something else without a word. So ``packed_checkpoint`` sends a few
random tokens through both before it keeps a file. The reference unpacks one weight at a time. One thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvswap.errors import ModelError
from kvswap.weights.modules import PackedEmbedding, PackedLinear, exact, product_dtype

_TOKENS = 24
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Most that the logits may differ, as a share of them, by the dtype of the products."""
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)


@torch.no_grad()
def check_products(name: str, empty: Callable[[], PreTrainedModel], fill: Callable[[PreTrainedModel], None]) -> None:
    """Raise ModelError where the logits of both differ. ``empty`` makes a model, ``fill`` packs it."""
    packed, reference = empty(), empty()
    for model in (packed, reference):
        model.eval().requires_grad_(False)
    layers = dict(reference.named_modules())
    fill(packed)
    fill(reference)
    for path, module in list(reference.named_modules()):
        if isinstance(module, PackedLinear | PackedEmbedding):
            reference.set_submodule(path, _with_unpacked_weight(layers[path], module))
    size = reference.config.get_text_config().vocab_size
    ids = torch.randint(0, size, (1, _TOKENS), generator=torch.Generator().manual_seed(5))
    expected = reference(ids, use_cache=False).logits
    try:
        with exact(packed, keep=False):
            found = packed(ids, use_cache=False).logits
        difference = float((found - expected).norm() / expected.norm())
        what = f"its logits differ by {difference:.0%}"
    except _FAILURES as error:
        difference, what = float("inf"), (str(error).splitlines() or [type(error).__name__])[0]
    if not difference <= BOUNDS[product_dtype(torch.float32)]:
        raise ModelError(
            f"model {name}: its family does not run with packed weights: {what}",
            hint="use --weights auto, which takes the checkpoint as it is",
        )


def _with_unpacked_weight(layer: nn.Module, packed: PackedLinear | PackedEmbedding) -> nn.Module:
    """The family's own layer, whose ``weight`` is unpacked when it is asked for."""
    del layer._parameters["weight"]
    layer.__dict__["_packed"] = packed  # past the list of its modules: it is no part of the layer
    layer.__class__ = _unpacking(type(layer))
    return layer


def _unpacking(kind: type[nn.Module]) -> type[nn.Module]:
    def weight(self: Any) -> torch.Tensor:
        return self._packed.unpack()  # type: ignore[no-any-return]

    return type(kind.__name__, (kind,), {"weight": property(weight)})
