"""Selection by every KV head for itself, and the union of what they want, which is what is read."""

from __future__ import annotations

import numpy as np
import torch

from kvswap.selection.mass import top_groups
from kvswap.terms import BoolArray, IntArray

Bool = BoolArray


def groups_of_heads(scores: torch.Tensor, first: int, ends: IntArray, count: int) -> tuple[IntArray, Bool]:
    """The ``count`` best groups of every head within ``[first, ends[b])``.

    Parameters
    ----------
    scores
        ``[B, H_kv, N]`` float32, finite within the range.

    Returns
    -------
    The union over heads, ``[B, n]`` ascending, where surplus entries are N, at the end; and which head selected which
    of them, ``[B, H_kv, n]``.
    """
    batch, heads, groups = scores.shape
    picked = top_groups(scores.flatten(0, 1), first, np.repeat(ends, heads), count)
    marks = np.zeros((batch, heads, groups + 1), np.bool_)
    np.put_along_axis(marks, picked.cpu().numpy().reshape(batch, heads, -1), True, axis=2)
    sequences, wanted = np.nonzero(marks[:, :, :groups].any(axis=1))
    counts = np.bincount(sequences, minlength=batch)
    place = np.arange(len(wanted)) - (np.cumsum(counts) - counts)[sequences]
    union = np.full((batch, int(counts.max(initial=0))), groups, np.int64)
    union[sequences, place] = wanted
    marks[:, :, groups] = False
    return union, np.take_along_axis(marks, union[:, None], axis=2)
