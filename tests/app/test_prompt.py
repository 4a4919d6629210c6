"""Requests: texts that no tokenizer takes are refused, and one that is far too long is not tokenized whole."""

from __future__ import annotations

import pytest

from kvswap.app.documents import Document
from kvswap.app.engine import Engine
from kvswap.app.prompt import PIECE_CHARACTERS, check_length, make_request
from kvswap.config import Config
from kvswap.errors import InputError
from kvswap.models.loading import LoadedModel
from tests.helpers.families import tiny_model
from tests.helpers.folders import byte_tokenizer


@pytest.mark.parametrize("text", ["\udcff", "a\ud800b", "caf\udce9 au lait"])
def test_lone_surrogates_are_refused_by_name(text: str) -> None:
    with pytest.raises(InputError, match=r"the question is not UTF-8 text \(character \d\); write it in UTF-8"):
        make_request(text)
    with pytest.raises(InputError, match=r"document notes\.md is not UTF-8 text"):
        make_request("Who?", [Document("a.md", "x"), Document("notes.md", text)])


class Counting:
    """A tokenizer of one token a character; counts what it is given."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        self.seen += len(text)
        return {"input_ids": [0] * len(text)}


def test_counting_stops_at_twice_the_limit() -> None:
    for context, question in (("x" * 5_000_000, "Who?"), ("x", "y" * 5_000_000)):
        tokenizer = Counting()
        with pytest.raises(InputError, match=r"the context has more than .* tokens, and the model's limit is 100,000"):
            check_length(tokenizer, [make_request(question, [Document("a", context)])], 100_000)
        assert tokenizer.seen <= 200_000 + 2 * PIECE_CHARACTERS


def test_what_may_fit_is_never_refused() -> None:
    tokenizer = Counting()
    check_length(tokenizer, [make_request("Who?", [Document("a", "x" * 5_000_000)])], None)
    check_length(tokenizer, [make_request("Who?", [Document("a", "x" * 799_000)])], 100_000)
    assert tokenizer.seen == 0

    def words(text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [0] * -(-len(text) // 30)}

    check_length(words, [make_request("Who?", [Document("a", "x" * 2_900_000)])], 100_000)


def test_engine_refuses_a_long_line_before_it_is_tokenized(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    model = tiny_model("llama", vocab_size=259, max_position_embeddings=512)
    with Engine(LoadedModel(model, tokenizer, "tiny"), Config(kv_dir=str(tmp_path), sketch_rank=None)) as engine:
        monkeypatch.setattr(type(engine._conversation), "prompt", None)  # which would tokenize all of it
        with pytest.raises(InputError, match=r"more than .* tokens, and the model's limit is 512; give fewer"):
            list(engine.ask("Who?", [Document("a", "x" * 5_000_000)]))
