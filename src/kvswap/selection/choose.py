"""Chooses the groups that a layer will attend to, by estimated attention mass.

The published scheme (KVSwap, arXiv 2511.11907, section 3) sums raw logits over heads. Here every head's logits go
through a softmax first. So every head counts the same, and a head that attends only to the sinks cannot outweigh one
that looks for something.
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

    The published scheme takes the best token of a group. But a group is read and attended to as a whole, so its score
    is the mass of all its tokens (docs/predictor.md has the measurement).

    Parameters
    ----------
    logits
        ``[B, H_q, T]`` float32, scaled, -inf where there is no token. An incomplete last group is left out.

    Returns
    -------
    ``[B, T // G]`` float32: summed over heads and over the tokens of the group.
    """
    mass = torch.softmax(logits, dim=-1).sum(dim=1)
    whole = mass.shape[1] // group_tokens * group_tokens
    grouped: torch.Tensor = mass[:, :whole].unflatten(1, (-1, group_tokens)).sum(dim=-1)
    return grouped


def best_of_groups(scores: torch.Tensor, group_tokens: int) -> torch.Tensor:
    """The best token's score of each group: ``[B, T]`` to ``[B, T // G]``. An incomplete last group is left out."""
    whole = scores.shape[1] // group_tokens * group_tokens
    best: torch.Tensor = scores[:, :whole].unflatten(1, (-1, group_tokens)).amax(dim=-1)
    return best


def top_groups(scores: torch.Tensor, first: int, ends: Sequence[int] | NDArray[np.int64], count: int) -> torch.Tensor:
    """The ``count`` best groups within ``[first, ends[b])``, in ascending order.

    Parameters
    ----------
    scores
        ``[B, N]`` float32, finite within the range; values outside of it may be overwritten.

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
