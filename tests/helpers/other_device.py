"""A second device in pure Python: its tensors are those of the CPU in disguise, and what meets a host tensor fails.

On an accelerator, an operator on tensors of host and device raises. So does taking an address for C, or NumPy's view,
of what is not in host memory. This device does the same where there is no accelerator. Copies between the two are
allowed, and so are numbers (tensors without dimensions). Unlike CUDA, it refuses host tensors as indices too, which
would be copied unseen. PyTorch's place for devices of others is used, which a process has once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

DEVICE = torch.device("privateuseone:0")
_COPIES = {"aten::copy_", "aten::_to_copy", "aten::to"}


class OtherTensor(torch.Tensor):
    """A tensor of the other device; ``raw`` is where its elements are."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> OtherTensor:
        """Disguise a tensor."""
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Operators outside of ``other_device``."""
        return _run(op, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees operators without a tensor of the device among their arguments: factories, and copies to it."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})


def _run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, given.append, (args, kwargs))
    others = [each for each in given if isinstance(each, OtherTensor)]
    hosts = [each for each in given if not isinstance(each, OtherTensor) and each.dim() > 0]
    name = op._schema.name
    if others and hosts and name not in _COPIES:
        raise RuntimeError(f"{name}: tensors on host and device meet: {[tuple(each.shape) for each in given]}")
    target = kwargs.get("device")
    here = bool(others) if target is None else torch.device(target).type == DEVICE.type
    if name == "aten::copy_":
        here = isinstance(args[0], OtherTensor)
    if target is not None:
        kwargs = {**kwargs, "device": "cpu"}
    raw_args, raw_kwargs = tree_map_only(OtherTensor, lambda each: each.raw, (args, kwargs))
    result = op(*raw_args, **raw_kwargs)
    same = {id(each.raw): each for each in others}
    if not here:
        return result
    return tree_map_only(torch.Tensor, lambda each: same[id(each)] if id(each) in same else OtherTensor(each), result)


@functools.cache
def _register() -> None:
    from torch.utils import backend_registration

    backend_registration._setup_privateuseone_for_python_backend()
    for name in ("empty_strided", "empty.memory_format"):  # what ``torch.tensor`` calls, where no mode sees it
        torch.library.impl(f"aten::{name}", "PrivateUse1", functools.partial(_empty, name))
    torch.library.impl("aten::_copy_from", "PrivateUse1", _copy_from)


def _empty(name: str, *args: Any, **kwargs: Any) -> OtherTensor:
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return OtherTensor(op(*args, **{**kwargs, "device": "cpu"}))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    here, there = (each.raw if isinstance(each, OtherTensor) else each for each in (source, target))
    there.copy_(here)
    return target


@contextmanager
def other_device() -> Iterator[torch.device]:
    """The device, for the length of a block."""
    _register()
    with _Mode():
        yield DEVICE


def to_other(model: nn.Module) -> nn.Module:
    """Move a model to the device, in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(OtherTensor(parameter.detach()), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OtherTensor(buffer)
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor):  # the original frequencies of RoPE
                vars(module)[name] = OtherTensor(value)
    return model
