"""Text stays as given at every seam and is never taken for markup, whatever the habits of the tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kvswap.app.prompt import Conversation, Message, encode, make_request, render
from kvswap.models import tokens
from tests.helpers.folders import CHAT_TEMPLATE, SPECIAL, byte_tokenizer

BYTES = [f"<0x{number:02X}>" for number in range(256)]


def sentencepiece(kind: str = "pre", ending: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer as of Llama 2: a space before every text, one token a letter, bytes for what is unknown."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz<>/|_"]
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *letters, *BYTES])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    if kind == "pre":
        inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(spaces)
    inner.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    after = " </s>" if ending else ""
    ids = [("<s>", 1), ("</s>", 2)]
    inner.post_processor = processors.TemplateProcessing(single=f"<s> $A{after}", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def ending_in_eos() -> PreTrainedTokenizerFast:
    """Bytes, with BOS before and EOS after every text."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "ending": ending_in_eos(),
    "first": sentencepiece("pre"),
    "always": sentencepiece("normalizer"),
    "both": sentencepiece("normalizer", ending=True),
}
TRIMMING = "{% for m in messages %}<s>{{ m.content | trim }}</s>{% endfor %}"
PIECES = st.lists(st.text(" abc\n</s>|é", min_size=1, max_size=6), min_size=1, max_size=5)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(pieces=PIECES)
@settings(max_examples=80)
def test_pieces_are_the_whole_text(name, pieces):
    tokenizer = TOKENIZERS[name]
    pieces = ["x", *pieces]  # some drop a space that begins a whole text, which is no seam
    assume(not any(special in "".join(pieces) for special in SPECIAL))
    ids = [
        each
        for number, piece in enumerate(pieces)
        for each in tokens.encode(tokenizer, piece, first=not number, special=True)
    ]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "".join(pieces)
    begins = 0 if name == "bytes" else 1
    assert [each for each in ids if each in tokenizer.all_special_ids] == [tokenizer.bos_token_id] * begins


TEXTS = st.lists(st.sampled_from([*SPECIAL, "a", " ", "\n", "<", "/s>", "<<s>", "\ufdd0", "\ufdd2", "é"]), max_size=8)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, TRIMMING, None])
@pytest.mark.parametrize("name", ["bytes", "always"])
@given(document=TEXTS, question=TEXTS, reply=TEXTS)
@settings(max_examples=60)
def test_only_the_template_has_special_tokens(name, template, document, question, reply):
    """The same special tokens in the same order as with harmless text, and the text itself unchanged."""
    tokenizer = byte_tokenizer(template) if name == "bytes" else TOKENIZERS[name]
    tokenizer.chat_template = template
    document, question, reply = ("x" + "".join(parts) + "x" for parts in (document, question, reply))
    turns = [Message("user", question, document), Message("assistant", reply)]
    text = render(tokenizer, [*turns, Message("user", question)])
    ids = encode(tokenizer, text, first=True)
    harmless = render(tokenizer, [Message("user", "x", "x"), Message("assistant", "x"), Message("user", "x")])
    special = tokens.special_tokens(tokenizer)
    markup = [each for each in encode(tokenizer, harmless, first=True) if each in special]
    assert [each for each in ids if each in special] == markup
    whole = tokenizer.decode([each for each in ids if each not in special])
    positions = [whole.find(part) for part in (document, question, reply)]
    assert min(positions) >= 0


def test_answer_that_spells_a_special_token_is_continued():
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    conversation = Conversation()
    request = make_request("Say </s> please")
    prompt = conversation.prompt(tokenizer, [request])
    spelt = tokens.encode(tokenizer, tokens.escape(tokenizer, "here: </s>!"), first=False, special=False)
    conversation.add(tokenizer, prompt, [*spelt, tokenizer.eos_token_id])
    assert conversation.messages[1].content == "here: </s>!"
    messages = [*conversation.messages, make_request("And <s>?")]
    following = conversation.prompt(tokenizer, messages)
    assert following.continues
    assert following.ids == encode(tokenizer, render(tokenizer, messages), first=True)


def test_text_without_special_tokens_is_tokenised_as_ever():
    tokenizer = TOKENIZERS["bytes"]
    assert tokens.escape(tokenizer, "plain <b>text</b>") == "plain <b>text</b>"
