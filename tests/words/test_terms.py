from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvswap.store.layout import GroupLayout
from kvswap.terms import KVGeometry, ceil_div, round_up

GEOMETRIES = st.builds(
    KVGeometry,
    kv_heads=st.integers(1, 16),
    head_dim=st.integers(1, 256),
    group_tokens=st.integers(1, 64),
    itemsize_bytes=st.sampled_from([2, 4]),
)


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 20))
def test_rounding_up(value: int, step: int) -> None:
    assert (ceil_div(value, step) - 1) * step < value <= ceil_div(value, step) * step
    assert round_up(value, step) == ceil_div(value, step) * step


def test_geometry_of_a_small_model() -> None:
    geometry = KVGeometry(kv_heads=3, head_dim=64, group_tokens=4, itemsize_bytes=2)
    assert geometry.key_elements == 192
    assert geometry.token_bytes == 768
    assert geometry.group_bytes == 3072


@given(GEOMETRIES, st.sampled_from([1, 512, 4096]), st.integers(0, 10_000))
def test_groups_lie_in_aligned_slots(geometry: KVGeometry, alignment_bytes: int, groups: int) -> None:
    layout = GroupLayout(geometry, alignment_bytes)
    assert layout.slot_bytes % alignment_bytes == 0
    assert 0 <= layout.slot_bytes - geometry.group_bytes < alignment_bytes
    assert layout.group_elements * geometry.itemsize_bytes == geometry.group_bytes
    kinds, heads, tokens, elements = layout.group_shape
    assert kinds * heads * tokens * elements == layout.group_elements
    stripe_groups = layout.stripe_groups(groups)
    size_bytes, stripe_bytes = layout.file_bytes(3, groups, stripe_groups), 3 * stripe_groups * layout.slot_bytes
    assert 0 <= size_bytes - 3 * max(1, groups) * layout.slot_bytes < stripe_bytes
    assert size_bytes % stripe_bytes == 0
