"""Which groups the next layer will attend to, from estimated attention mass.

The published scheme (KVSwap, arXiv 2511.11907, section 3) sums raw logits over heads. Here every head's logits go
through the softmax first, so that a head's vote is the share of its attention, and heads that look at the sinks alone
do not outvote those that look for something.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.native import loops

MINUS_INF = float("-inf")


def group_mass(logits: torch.Tensor, group_tokens: int) -> torch.Tensor:
    """Estimated attention mass of each group.

    The published scheme takes the best token of a group. A group is read as a whole and attended to as a whole, so what
    it is worth is the mass of all its tokens (docs/predictor.md has the measurement).

    Parameters
    ----------
    logits
        ``[B, H_q, T]`` float32, scaled, -inf where there is no token. A rest of fewer than G tokens is left out.

    Returns
    -------
    ``[B, T // G]`` float32: summed over heads and over the tokens of the group.
    """
    mass = torch.softmax(logits, dim=-1).sum(dim=1)
    whole = mass.shape[1] // group_tokens * group_tokens
    grouped: torch.Tensor = mass[:, :whole].unflatten(1, (-1, group_tokens)).sum(dim=-1)
    return grouped


def best_of_groups(scores: torch.Tensor, group_tokens: int) -> torch.Tensor:
    """Best token of each group: ``[B, T]`` to ``[B, T // G]``. A rest of fewer than G tokens is left out."""
    whole = scores.shape[1] // group_tokens * group_tokens
    best: torch.Tensor = scores[:, :whole].unflatten(1, (-1, group_tokens)).amax(dim=-1)
    return best


def top_groups(scores: torch.Tensor, first: int, ends: Sequence[int] | NDArray[np.int64], count: int) -> torch.Tensor:
    """The ``count`` best groups within ``[first, ends[b])``, in ascending order.

    Parameters
    ----------
    scores
        ``[B, N]`` float32, finite within the range; what lies outside of it is overwritten.

    Returns
    -------
    ``[B, count]`` int64. Where a range holds fewer groups than ``count``, the surplus entries are N, at the end.
    """
    groups = scores.shape[1]
    if scores.device.type == "cpu" and loops.available():
        return torch.from_numpy(loops.top_groups(scores, first, ends, count))
    low, high = first, max(ends)
    window = scores[:, low:high]
    for row, end in enumerate(ends):
        if end < high:
            window[row, end - low :] = MINUS_INF
    picked = window.topk(min(count, high - low), dim=1, sorted=False)
    found = torch.where(picked.values == MINUS_INF, groups, picked.indices + low).sort(dim=1).values
    if found.shape[1] < count:
        found = torch.nn.functional.pad(found, (0, count - found.shape[1]), value=groups)
    return found
