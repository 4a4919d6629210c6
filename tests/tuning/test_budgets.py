"""Budgets by layer: under the total, within their ends, and where they keep the most mass."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvswap.tuning.budgets import LEAST_SHARE, MOST_SHARE, layer_groups


def concentrated(sharpness: list[float], width: int = 200) -> np.ndarray:
    """Mass kept by the best groups of layers whose attention falls off at these rates."""
    ranks = np.arange(width)
    mass = np.exp(-np.outer(sharpness, ranks))
    mass /= mass.sum(axis=1, keepdims=True)
    return np.concatenate((np.zeros((len(sharpness), 1)), mass.cumsum(axis=1)), axis=1).astype(np.float32)


def test_diffuse_layers_get_more_and_together_keep_more() -> None:
    kept = concentrated([0.2, 0.02, 0.005])
    found = layer_groups(kept, 50)
    assert found[0] < found[1] <= found[2] and sum(found) <= 150
    by_layer = sum(float(kept[layer, count]) for layer, count in enumerate(found))
    assert by_layer > float(kept[:, 50].sum())


def test_equal_layers_get_the_same() -> None:
    assert layer_groups(concentrated([0.03] * 4), 50) == [50] * 4


@given(
    arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(30, 90)), elements=st.floats(0, 1, width=32)),
    st.integers(1, 29),
)
def test_every_layer_stays_within_its_ends_and_all_within_the_total(gains: np.ndarray, mean: int) -> None:
    found = layer_groups(gains.cumsum(axis=1, dtype=np.float32), mean)
    assert len(found) == len(gains) and sum(found) <= mean * len(gains)
    assert all(max(1, int(LEAST_SHARE * mean)) <= count <= max(1, int(MOST_SHARE * mean)) for count in found)
