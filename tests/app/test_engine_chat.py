"""Messages with roles, raw text, and the options of sampling: the same path as ``ask``, and only what is new."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvswap.app.context import Context
from kvswap.app.documents import Document
from kvswap.app.engine import Engine, load
from kvswap.config import Config
from kvswap.errors import ConfigError, InputError, SessionError
from kvswap.models.loading import LoadedModel, load_model
from kvswap.models.logprobs import Logprobs
from kvswap.sessions.catalog import open_or_create_store
from tests.helpers.folders import CHAT_TEMPLATE, save_tiny

STORY = "".join(f"Line {number} of a story. " for number in range(60))
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE

pytestmark = pytest.mark.usefixtures("cache_home")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> LoadedModel:
    return load_model(str(save_tiny(tmp_path_factory.mktemp("tiny"), max_position_embeddings=8192)))


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(kv_dir=str(tmp_path / "kv"), kv_memory="16MiB", select_tokens=6000)


@pytest.fixture
def engine(loaded, config) -> Iterator[Engine]:
    with load(loaded, config) as engine:
        yield engine


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_messages_are_what_questions_are(engine: Engine) -> None:
    asked = "".join(engine.ask("Who?", [Document("a", STORY)], system="Be brief.", max_new_tokens=8))
    again = "".join(engine.ask("And?", max_new_tokens=8))
    tokens = engine.stats.prompt_tokens
    messages = [{"role": "system", "content": "Be brief."}, user(f"{STORY.strip()}\n\nWho?")]
    assert "".join(engine.chat(messages, max_new_tokens=8)) == asked
    messages += [{"role": "assistant", "content": asked}, user("And?")]
    assert "".join(engine.chat(messages, max_new_tokens=8)) == again
    assert engine.stats.prompt_tokens == tokens and engine.stats.computed_tokens < 40


def test_an_edited_question_computes_what_differs(engine: Engine) -> None:
    first = [user(STORY + "Who?")]
    answer = "".join(engine.chat(first, max_new_tokens=8))
    for question in ("What?", "Why?"):
        list(engine.chat([*first, {"role": "assistant", "content": answer}, user(question)], max_new_tokens=8))
        assert engine.stats.computed_tokens < 50


def test_system_stays_until_another_is_given(engine: Engine) -> None:
    list(engine.ask("Who?", system="Be brief.", max_new_tokens=2))
    list(engine.ask("What?", max_new_tokens=2))
    assert [each.role for each in engine._conversation.messages] == ["system", *["user", "assistant"] * 2]
    list(engine.ask("Why?", system="Be long.", max_new_tokens=2))
    assert [each.content for each in engine._conversation.messages if each.role == "system"] == ["Be long."]


def test_system_text_where_the_template_refuses_it(tmp_path, config) -> None:
    loaded = load_model(str(save_tiny(tmp_path / "m", chat_template=NO_SYSTEM)))
    with load(loaded, config) as engine:
        list(engine.ask("Who?", system="Be brief.", max_new_tokens=2))
        assert "<s>user: Be brief.\n\nWho?</s>" in engine._conversation.text


def test_answer_ends_before_a_stop_string(engine: Engine) -> None:
    whole = "".join(engine.chat([user("Who?")], max_new_tokens=40))
    stop = whole[9:12]
    pieces = list(engine.chat([user("Who?")], max_new_tokens=40, stop=(stop,)))
    assert "".join(pieces) == whole[: whole.index(stop)] == engine.stats.text
    assert engine.stats.finish_reason == "stop" and engine.stats.new_tokens < 40
    assert engine._conversation.messages[-1].content == "".join(pieces)


@pytest.mark.parametrize("wrong", [{"stop": ("",)}, {"top_k": -1}, {"min_p": 1.5}, {"stop": "text"}])
def test_wrong_options_are_refused_at_once(engine: Engine, wrong) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        engine.ask("Who?", **wrong)


def test_top_k_of_one_is_the_likeliest(engine: Engine) -> None:
    likeliest = "".join(engine.chat([user("Who?")], max_new_tokens=12))
    assert "".join(engine.chat([user("Who?")], max_new_tokens=12, temperature=2.0, top_k=1, seed=1)) == likeliest
    assert "".join(engine.chat([user("Who?")], max_new_tokens=12, temperature=0.5, min_p=1.0, seed=1)) == likeliest
    assert "".join(engine.chat([user("Who?")], max_new_tokens=12, temperature=2.0, seed=1)) != likeliest


def test_logprobs_are_of_the_chosen_tokens(engine: Engine) -> None:
    found = Logprobs(3)
    list(engine.chat([user("Who?")], max_new_tokens=5, logprobs=found))
    assert [each.token_id for each in found.tokens] == engine.stats.token_ids
    for each in found.tokens:  # the likeliest was taken
        assert each.top[0] == (each.token_id, each.logprob) and len(each.top) == 3
        assert each.logprob < 0 and each.top[0][1] >= each.top[1][1]


def test_raw_text_goes_on(engine: Engine) -> None:
    first = "".join(engine.complete("Once upon", max_new_tokens=6))
    list(engine.complete("Once upon" + first + " and", max_new_tokens=6))
    assert engine.stats.computed_tokens <= 12
    ids = engine._conversation.ids
    list(engine.complete([*ids, 5, 6], max_new_tokens=2))
    assert engine.stats.computed_tokens <= 3


@pytest.mark.parametrize("messages", [[], [{"role": "user", "content": 5}], [{"content": "x"}], [user("\ud800")]])
def test_wrong_messages_are_refused(engine: Engine, messages) -> None:
    with pytest.raises(InputError):
        list(engine.chat(messages))


def test_conversation_of_version_0_1_goes_on(loaded, config) -> None:
    """Turns of documents, question and answer, as earlier versions stored them."""
    with load(loaded, config, session="old") as engine:
        list(engine.ask("Who?", [Document("a", STORY)], max_new_tokens=3))
        session = engine.session
        assert session is not None
        messages, text = engine._conversation.messages, engine._conversation.text
        turn = [messages[0].context, messages[0].content, messages[1].content]
        old = {"turns": [turn], "text": text, "tokens": len(session.token_ids)}
        session.commit(session.token_ids, json.dumps(old).encode())
    with load(loaded, config, session="old") as engine:
        assert engine._conversation.messages == [replace(each, documents=()) for each in messages]
        list(engine.ask("And?", max_new_tokens=3))
        assert engine.stats.computed_tokens < 40


def pieced(loaded: LoadedModel, config: Config, name: str, on_progress=None) -> Engine:
    store = open_or_create_store(config.kv_dir, name)
    return Engine(loaded, config, session=store, share=False, piece_tokens=512, on_progress=on_progress)


def test_a_prompt_that_is_left_half_way_keeps_its_pieces(loaded, config) -> None:
    question, seen = [user(STORY * 2)], list[tuple[int, int]]()

    class LeftError(Exception):
        pass

    def leave(stage: str, done: int, total: int) -> None:
        seen.append((done, total))
        if stage == "prefill" and done > 1100:
            raise LeftError

    engine = pieced(loaded, config, "long", leave)
    with pytest.raises(LeftError):
        list(engine.chat(question, max_new_tokens=3))
    engine.close()
    assert {total for _, total in seen} == {engine.stats.prompt_tokens} and seen == sorted(seen)
    with pieced(loaded, config, "long") as engine:
        assert engine.session is not None and engine.session.tokens == 1024
        answer = "".join(engine.chat(question, max_new_tokens=9))
        assert engine.stats.stored_tokens == 1024
        with pytest.raises(SessionError):  # the pieces and the answer are one turn
            engine.undo(), engine.undo()
    with load(loaded, config) as whole:
        assert "".join(whole.chat(question, max_new_tokens=9)) == answer


def test_context_without_a_session_has_nothing_to_prepare(loaded, config) -> None:
    told = list[str]()
    context = Context(
        loaded, config, load_method(), share=True, piece_tokens=512, on_progress=print, on_notice=told.append
    )
    context.prepare([1, 2, 3], b"")
    assert context.cache is None and not told
    context.close()


def load_method():
    from kvswap.selection.kvswap import method

    return method()


def test_options_on_the_command_line(tiny: Path, tmp_path, capfd) -> None:
    from kvswap.cli.main import run_command

    base = ["run", "--model", str(tiny), "--ask", "Who?", "--max-new-tokens", "30", "--kv-dir", str(tmp_path / "kv")]
    assert run_command([*base, "--system", "Be brief.", "--top-k", "1", "--temperature", "1", "--min-p", "0.1"]) == 0
    whole = capfd.readouterr().out.rstrip("\n")
    stop = whole[5:8]
    assert run_command([*base, "--system", "Be brief.", "--stop", stop, "--stop", "never there"]) == 0
    assert capfd.readouterr().out == whole[: whole.index(stop)] + "\n"
    assert run_command([*base, "--top-k", "-1"]) == 2
    assert "top_k" in capfd.readouterr().err
