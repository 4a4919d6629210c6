"""Log-probabilities of the tokens of an answer, by the model's own logits: before temperature and other options.

``Logprobs`` watches a ``Generation``: it is called with the logits of each step, then with the token that was chosen.
Called by the thread that generates; another one may read ``tokens``, which only grows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its log-probability (natural), and the likeliest tokens of its place: id and log-probability."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Logprobs:
    """Keeps the chosen token of each step, and the ``top`` likeliest ones."""

    def __init__(self, top: int) -> None:
        self.tokens: list[TokenLogprob] = []
        self._top = top
        self._row: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, logits: torch.Tensor) -> None:
        """Take the logits ``[1, V]`` of a step."""
        self._row = torch.log_softmax(logits[0].float(), dim=-1)

    def chosen(self, token_id: int) -> None:
        """The token that was chosen in this step."""
        if self._row is not None:
            self.tokens.append(token_logprob(self._row, token_id, self._top))
            self._row = None


def token_logprob(row: torch.Tensor, token_id: int, top: int) -> TokenLogprob:
    """What ``row``, log-probabilities ``[V]`` in float32, says about a token."""
    values, ids = torch.topk(row, min(top, len(row)))
    pairs = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, float(row[token_id]), pairs)
