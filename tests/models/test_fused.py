"""Fused norm and RoPE: used where they compute the same as the family's code, and only there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kvswap.models.adapter import inspect
from kvswap.models.fused import fused_norm, fused_rope, rotate_halves
from kvswap.native import query_loops
from tests.helpers.families import FAMILIES, tiny_model


class Scaled(nn.Module):
    """A norm by the largest element, with all that a root-mean-square norm has."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(elements)), 1e-6

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden / hidden.abs().amax(-1, keepdim=True)


@pytest.fixture(params=["compiled", "plain"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled loops, and as where there was no compiler."""
    if request.param == "plain":
        monkeypatch.setattr(query_loops, "available", lambda: False)
        monkeypatch.setattr(query_loops, "threaded_library", pytest.fail)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_fused_versions_that_compute_the_same(family: str) -> None:
    model = tiny_model(family)
    for part in inspect(model).layers:
        norm = part.module.input_layernorm
        norm.weight.data += 0.1 * torch.randn_like(norm.weight)  # read at each call
        hidden = torch.randn(2, 1, 64)
        assert part.norm is not norm
        assert torch.allclose(part.norm(hidden), norm(hidden), atol=1e-5)
        if part.order is not None:
            assert part.rope is rotate_halves


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_predictions_are_those_of_the_familys_own_code(family: str) -> None:
    model = tiny_model(family)
    parts = inspect(model)
    hidden, positions = torch.randn(2, 1, 64), torch.tensor([[700]])
    for part in parts.offloaded:
        cos, sin = parts.rotary(hidden, positions, part.layer_type)
        own = part.attention.q_proj(part.module.input_layernorm(hidden)).view(2, 1, -1, 16)
        own = getattr(part.attention, "q_norm", lambda query: query)(own).transpose(1, 2)
        rope = __import__(type(part.attention).__module__, fromlist=["x"]).apply_rotary_pos_emb
        wanted = rope(own, own[:, :1], cos, sin)[0][:, :, 0]
        assert torch.allclose(part.predict_query(hidden, cos, sin), wanted, atol=1e-5)


def test_another_formula_keeps_its_own_code() -> None:
    norm = Scaled(16)
    assert fused_norm(norm) is norm
    assert fused_norm(None) is None

    def pairs(
        query: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        other = torch.stack((-query[..., 1::2], query[..., ::2]), -1).flatten(-2)
        return query * cos[:, None] + other * sin[:, None], keys

    rope, query = fused_rope(pairs, 8), torch.randn(2, 3, 8)
    cos, sin = torch.rand(2, 1, 1, 8)
    assert rope is not rotate_halves
    assert torch.equal(rope(query, cos, sin), pairs(query[:, :, None], query[:, :1, None], cos, sin)[0][:, :, 0])


def test_a_norm_with_hooks_is_called() -> None:
    norm = copy.deepcopy(tiny_model("llama").model.layers[0].input_layernorm)
    assert fused_norm(norm) is not norm
    norm.register_forward_hook(lambda module, given, result: 2 * result)
    assert fused_norm(norm) is norm


def test_a_norm_that_does_not_tell_its_epsilon_keeps_its_own_code() -> None:
    norm = nn.RMSNorm(8, eps=1e-6)
    assert fused_norm(norm) is not norm
    norm.eps = None
    assert fused_norm(norm) is norm
