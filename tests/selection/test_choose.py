from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvswap.native import loops
from kvswap.selection.choose import group_mass, top_groups

MINUS_INF = float("-inf")


def test_mass_is_softmax_summed_over_heads_and_over_a_group() -> None:
    logits = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0))
    logits[1, :, 13:] = MINUS_INF
    shares = torch.softmax(logits.double(), -1).sum(1)
    expected = torch.stack([shares[:, start : start + 4].sum(1) for start in range(0, 24, 4)], 1)
    found = group_mass(logits.clone(), 4)
    assert found.shape == (2, 6)
    assert torch.allclose(found.double(), expected, atol=1e-6)
    assert found[1, 4:].tolist() == [0.0, 0.0]


def test_a_rest_that_fills_no_group_is_left_out() -> None:
    logits = torch.randn(1, 3, 26, generator=torch.Generator().manual_seed(0))
    expected = torch.softmax(logits, -1).sum(1)[:, :24].view(1, 6, 4).sum(-1)
    assert torch.equal(group_mass(logits, 4), expected)


def test_a_head_that_shouts_has_one_vote() -> None:
    """Raw logits summed over heads would choose group 0; two of three heads attend to group 1."""
    logits = torch.zeros(1, 3, 8)
    logits[0, 0, 0] = 100.0
    logits[0, 1:, 4] = 10.0
    assert logits[:, :, 0].sum() > logits[:, :, 4].sum()
    assert top_groups(group_mass(logits, 4), 0, [2], 1).tolist() == [[1]]


@st.composite
def choices(draw: st.DrawFn) -> tuple[torch.Tensor, int, list[int], int]:
    batch, groups = draw(st.integers(1, 3)), draw(st.integers(1, 30))
    first = draw(st.integers(0, groups))
    ends = draw(st.lists(st.integers(first, groups), min_size=batch, max_size=batch))
    order = draw(st.permutations(range(batch * groups)))
    mass = torch.tensor(order, dtype=torch.float32).view(batch, groups)
    return mass, first, ends, draw(st.integers(1, 35))


@pytest.mark.parametrize("compiled", [True, False])
@given(choice=choices())
def test_most_mass_within_the_range_ascending_padded_at_the_end(
    compiled: bool, choice: tuple[torch.Tensor, int, list[int], int]
) -> None:
    mass, first, ends, count = choice
    groups = mass.shape[1]
    by_mass = [sorted(range(first, end), key=lambda group: -row[group]) for row, end in zip(mass, ends, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(loops, "available", lambda: False)
        found = top_groups(mass.clone(), first, ends, count)
    assert found.dtype == torch.int64
    assert found.shape == (len(ends), count)
    for row, best in zip(found.tolist(), by_mass, strict=True):
        chosen = sorted(best[:count])
        assert row == chosen + [groups] * (count - len(chosen))


@pytest.mark.parametrize("ends", [[6, 4], [4, 6]])
def test_groups_without_mass_are_chosen_before_padding(ends: list[int]) -> None:
    found = top_groups(torch.zeros(2, 6), 2, ends, 4).tolist()
    assert found[ends.index(6)] == [2, 3, 4, 5]
    assert found[ends.index(4)] == [2, 3, 6, 6]
