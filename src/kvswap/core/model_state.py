"""Whether a model object is what it was: the things it consists of, compared one by one.

``model_state`` lists them for ``core/model_patch.py``, before a model is changed for kvswap. Two states are equal while
modules, classes, hooks, patched methods, plain attributes and the config are the same, and every tensor is the same
object with the same memory, version, dtype and device. What is written through ``tensor.data``, or within an object
that is no tensor, is not noticed. Nothing is kept alive. Any thread.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_PLAIN = (bool, int, float, str, bytes, type, torch.dtype, torch.device, type(None))


class _Same:
    """An object that is alive, compared by identity."""

    __slots__ = ("_object",)

    def __init__(self, value: Any) -> None:
        self._object = weakref.ref(value)

    def __eq__(self, other: object) -> bool:
        mine = self._object()
        return mine is not None and isinstance(other, _Same) and mine is other._object()

    __hash__ = None  # type: ignore[assignment] # an object that dies would change it


def model_state(model: nn.Module, decoder: nn.Module, config: Any) -> list[Any] | None:
    """What ``decoder`` consists of, and ``model`` round it, or None where that cannot be told."""
    found = list[Any]()
    try:
        for module in (model, *decoder.modules()):
            found += (type(module), _Same(type(module).forward))
            found.extend(_things(vars(module)))
        found.extend(_things(vars(config)))
    except (RuntimeError, TypeError):  # tensors of inference mode have no version, some objects no weak references
        return None
    return found


def _things(value: Any) -> Iterator[Any]:
    if isinstance(value, _PLAIN):
        yield value
    elif isinstance(value, torch.Tensor):
        yield from (_Same(value), value.data_ptr(), value._version, value.dtype, value.device)
    elif isinstance(value, dict):
        yield len(value)
        for key, each in value.items():
            yield key
            yield from _things(each)
    elif isinstance(value, list | tuple | set | frozenset):
        yield len(value)
        for each in value:
            yield from _things(each)
    else:
        yield _Same(value)
