"""Text of an answer as it comes: whole at every tokenizer's habits, and at the same cost for every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvswap.models import streaming
from kvswap.models.stop_text import StopText
from kvswap.models.streaming import _TimedStreamer
from tests.models.test_tokens import TOKENIZERS

NAMES = ("bytes", "always", "first")


class Counting:
    """A tokenizer that counts the tokens of its longest text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.longest = tokenizer, 0

    def decode(self, ids: list[int], **options: Any) -> str:
        self.longest = max(self.longest, len(ids))
        return str(self.tokenizer.decode(ids, **options))


def streamed(name: str, ids: list[int]) -> tuple[str, int]:
    """What is shown of an answer, and the most tokens that were decoded at once."""
    tokenizer = Counting(TOKENIZERS[name])
    streamer = _TimedStreamer(tokenizer, StopText([]), None)
    streamer.put(torch.tensor([[1, 2]]))  # the prompt
    for each in ids:
        streamer.put(torch.tensor([each]))
    streamer.end()
    return "".join(streamer.shown), tokenizer.longest


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text(" ab\né<", max_size=60), special=st.integers(0, 60))
@settings(max_examples=60)
def test_pieces_are_the_whole_answer_wherever_tokens_are_forgotten(name: str, text: str, special: int) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer("x" + text, add_special_tokens=False)["input_ids"]
    ids.insert(special, tokenizer.eos_token_id)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "_MOST_CACHED_TOKENS", 3)
        assert streamed(name, ids)[0] == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_long_line_is_not_decoded_again_and_again(name: str) -> None:
    tokenizer, text = TOKENIZERS[name], "ab a" * 200
    shown, longest = streamed(name, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert shown == text and longest <= streaming._MOST_CACHED_TOKENS + 2
