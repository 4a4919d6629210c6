"""Chat templates: which one is used, what becomes of one that fails, and the end of a turn."""

from __future__ import annotations

import pytest

from kvswap.app.engine import load
from kvswap.app.prompt import make_request, render
from kvswap.errors import ModelError
from kvswap.models.chat_template import apply_template, end_of_turn
from kvswap.models.loading import load_model
from kvswap.models.streaming import end_tokens
from tests.helpers.folders import CHAT_TEMPLATE, byte_tokenizer, save_tiny

BROKEN = [
    "{{ raise_exception('no user may speak here') }}",
    "{{ messages[17].content.name }}",
    "{% for message in messages %}",
    "{{ 1 / 0 }}",
    "{{ 'a' + 1 }}",
]


@pytest.mark.parametrize("template", BROKEN)
def test_template_that_fails_is_one_clear_error(template):
    with pytest.raises(ModelError, match="chat template cannot be used"):
        render(byte_tokenizer(template), [make_request("Who?")])
    assert end_of_turn(byte_tokenizer(template)) is None


def test_conversation_goes_on_after_a_template_that_failed(tmp_path, select_all, cache_home):
    picky = CHAT_TEMPLATE + "{% if 'bad' in messages[-1].content %}{{ raise_exception('bad word') }}{% endif %}"
    loaded = load_model(str(save_tiny(tmp_path / "m", chat_template=picky)))
    with load(loaded, select_all) as engine:
        list(engine.ask("Who?", max_new_tokens=3))
        with pytest.raises(ModelError, match="bad word"):
            list(engine.ask("bad", max_new_tokens=3))
        list(engine.ask("What?", max_new_tokens=3))
        assert engine.stats.stored_tokens > 0


def test_one_of_several_templates():
    several = {"tool_use": BROKEN[0], "rag": BROKEN[0], "chat": CHAT_TEMPLATE}
    messages = [{"role": "user", "content": "hello"}]
    expected = apply_template(byte_tokenizer(CHAT_TEMPLATE), messages)
    assert apply_template(byte_tokenizer(several), messages) == expected
    assert apply_template(byte_tokenizer({"default": CHAT_TEMPLATE, "b": BROKEN[0], "c": "x"}), messages) == expected
    with pytest.raises(ModelError, match="named chat, other, and none named"):
        apply_template(byte_tokenizer({"chat": CHAT_TEMPLATE, "other": "x"}), messages)


def test_end_of_a_turn_ends_an_answer(tmp_path):
    """A token that the template puts after an answer ends it, though no list of end tokens has it."""
    loaded = load_model(str(save_tiny(tmp_path / "m")))
    model, tokenizer = loaded.model, loaded.tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} <pad>\n{% endfor %}"
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = 2
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<pad>")
    assert set(end_tokens(model, tokenizer)) == {2, end_of_turn(tokenizer)}
    for without in (None, "{% for m in messages %}{{ m.content }}\n{% endfor %}", "nothing"):
        tokenizer.chat_template = without
        assert end_of_turn(tokenizer) is None
