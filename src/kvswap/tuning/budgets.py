"""How many groups each layer selects when all together may select so many.

After BaKlaVa (arXiv 2502.13176): some layers' attention is spread widely, others' is not, so the same total is better
spent where it keeps most attention mass. Arithmetic on arrays.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEAST_SHARE, MOST_SHARE = 0.4, 2.0
"""No layer gets less than this share of the mean, nor more: the most decides how much memory reads land in."""


def layer_groups(kept: NDArray[np.float32], mean_groups: int) -> list[int]:
    """Groups of each layer, ``mean_groups`` in the mean at most, that keep the most mass.

    ``kept`` is ``[L, K + 1]``: the mass that a layer keeps with so many groups; K at least ``mean_groups``.
    """
    layers, most = len(kept), min(kept.shape[1] - 1, max(1, int(mean_groups * MOST_SHARE)))
    least = min(most, max(1, int(mean_groups * LEAST_SHARE)))
    gains = np.diff(kept.astype(np.float64), axis=1)[:, least:most]
    # What a group adds falls with its rank; where it does not in the sample, the later ones lend to it.
    falling = np.maximum.accumulate(gains[:, ::-1], axis=1)[:, ::-1]
    spare = max(0, min(layers * (mean_groups - least), falling.size))
    order = np.argsort(-falling, axis=None, kind="stable")[:spare]
    extra = np.bincount(order // max(1, falling.shape[1]), minlength=layers) if spare else np.zeros(layers, int)
    return [int(least + count) for count in extra]
