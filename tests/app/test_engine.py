"""load and ask: the same tokens as transformers, one conversation, clean ends, and the numbers."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvswap.app.documents import Document
from kvswap.app.engine import Engine, load
from kvswap.app.prompt import render
from kvswap.config import Config
from kvswap.errors import ConfigError, InputError, MemoryBudgetError
from kvswap.lab.rivals.registry import find
from kvswap.models.adapter import cache_keyword
from kvswap.models.loading import LoadedModel, load_model
from tests.helpers.families import full_cache
from tests.helpers.folders import only_spaces, save_tiny

STATS = """
    model method config prompt_tokens new_tokens token_ids text prefill_s calibration_s ttft_s decode_tokens_per_s
    itl_ms kv_full_bytes kv_memory_limit_bytes kv_memory_peak_bytes prefill_peak_bytes process_peak_rss_bytes
    weights_mapped_bytes weights_anonymous_bytes
    disk_write_bytes disk_read_bytes disk_reads reuse_rate io_wait_s backend direct_io kvswap_version torch_version
    transformers_version
"""
DOCUMENT = Document("story.txt", "".join(f"Line {number} of a story. " for number in range(60)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(folder) -> LoadedModel:
    return load_model(str(folder))


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch) -> None:
    """Calibrations are shared by the tests of this run and stay out of the user's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def engine(loaded, select_all) -> Iterator[Engine]:
    with load(loaded, select_all) as engine:
        yield engine


def reference(loaded: LoadedModel, ids: list[int], count: int) -> list[int]:
    """What transformers generates by itself."""
    given = torch.tensor([ids])
    cache = {cache_keyword(loaded.model): full_cache(loaded.model)}
    output = loaded.model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False, eos_token_id=2, **cache
    )
    return output[0, len(ids) :].tolist()


def prompt_ids(loaded: LoadedModel, text: str) -> list[int]:
    return loaded.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_answer_is_that_of_transformers(engine, loaded):
    text = "".join(engine.ask("Who?", [DOCUMENT], max_new_tokens=30))
    stats = engine.stats
    ids = prompt_ids(loaded, f"<s>user: {DOCUMENT.text.strip()}\n\nWho?</s><s>assistant: ")
    assert stats.prompt_tokens == len(ids)
    assert stats.token_ids == reference(loaded, ids, 30)
    assert text == stats.text
    assert stats.disk_write_bytes > 0


def test_next_question_computes_only_what_is_new(engine, loaded):
    list(engine.ask("Who?", [DOCUMENT], max_new_tokens=9))
    first = engine.stats
    whole = prompt_ids(loaded, f"<s>user: {DOCUMENT.text.strip()}\n\nWho?</s><s>assistant: ") + first.token_ids
    list(engine.ask("And then?", [Document("b", "More.")], max_new_tokens=9))
    second = engine.stats
    whole += prompt_ids(loaded, "</s><s>user: More.\n\nAnd then?</s><s>assistant: ")
    assert second.stored_tokens == first.prompt_tokens + first.new_tokens - 1
    assert second.prompt_tokens == len(whole)
    assert second.token_ids == reference(loaded, whole, 9)
    assert second.notices == []


def test_plain_prompt_without_chat_template(tmp_path, select_all):
    plain = load_model(str(save_tiny(tmp_path / "plain", chat_template=None)))
    with load(plain, select_all) as engine:
        list(engine.ask("Who?", [DOCUMENT], max_new_tokens=5))
        ids = prompt_ids(plain, f"{DOCUMENT.text.strip()}\n\nQuestion: Who?\nAnswer:")
        assert engine.stats.token_ids == reference(plain, ids, 5)
        ids += engine.stats.token_ids
        list(engine.ask("What?", max_new_tokens=5))
        assert engine.stats.token_ids == reference(plain, ids + prompt_ids(plain, "\n\nQuestion: What?\nAnswer:"), 5)


def test_template_that_rewrites_history_is_computed_anew(folder, select_all):
    rewriting = load_model(str(folder))
    rewriting.tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    notices: list[str] = []
    with load(rewriting, select_all, on_notice=notices.append) as engine:
        list(engine.ask("Who?", [DOCUMENT], max_new_tokens=3))
        list(engine.ask("What?", max_new_tokens=3))
        assert engine.stats.stored_tokens == 0
    assert "anew" in notices[0]


DROPS_THINKING = (
    "{% for m in messages %}<s>{{ m.role }}: "
    "{{ m.content if loop.last or m.role == 'user' else m.content[3:] }}</s>{% endfor %}<s>assistant: "
)


@pytest.mark.parametrize("select_tokens", [6000, 100])
def test_template_that_drops_thinking_keeps_the_shared_beginning(folder, select_all, select_tokens):
    dropping, notices = load_model(str(folder)), list[str]()
    dropping.tokenizer.chat_template = DROPS_THINKING
    config = select_all.replace(select_tokens=select_tokens, recent_tokens=16)
    with load(dropping, config, on_notice=notices.append) as engine:
        for question in ("Who?", "What?", "And then?"):
            list(engine.ask(question, [DOCUMENT] if question == "Who?" else [], max_new_tokens=9))
            computed, ids = engine.stats.computed_tokens, engine.stats.token_ids
        messages = engine._conversation.messages
        assert computed < 120 and engine.stats.stored_tokens > len(DOCUMENT.text) - 100
    assert any("the first" in each and "stay" in each for each in notices)
    if select_tokens == 6000:
        text = render(dropping.tokenizer, messages[:5])
        assert ids == reference(dropping, prompt_ids(dropping, text), 9)


@pytest.mark.usefixtures("groups_are_read")
def test_stats_have_every_number_and_are_json(loaded, tmp_path):
    with load(loaded, Config(kv_dir=str(tmp_path / "kv"))) as engine:
        list(engine.ask("Who?", [Document("a", DOCUMENT.text * 2)], max_new_tokens=30))
        stats = engine.stats.to_dict()
    assert set(STATS.split()) <= set(stats)
    assert json.loads(json.dumps(stats)) == stats
    assert stats["new_tokens"] == len(stats["token_ids"]) == 30
    assert stats["kv_memory_peak_bytes"] <= stats["kv_memory_limit_bytes"]
    token_bytes = 3 * 2 * 2 * 16 * 2  # layers, K and V, heads, d, 16 bit
    assert stats["kv_full_bytes"] == (stats["prompt_tokens"] + 29) * token_bytes
    assert 0 < stats["ttft_s"] < 60
    assert stats["ttft_s"] >= stats["prefill_s"]
    assert list(stats["itl_ms"]) == ["p50", "p90", "p99"]
    assert stats["disk_read_bytes"] > 0 and stats["disk_reads"] > 0 and 0 <= stats["reuse_rate"] <= 1
    assert stats["config"]["sketch"].startswith("transform")


def test_load_takes_single_settings(loaded, select_all):
    with load(loaded, select_all, select_tokens=500, group_tokens=8) as engine:
        assert engine.config == select_all.replace(select_tokens=500, group_tokens=8)
    with load(loaded, kv_dir=select_all.kv_dir, kv_memory="64MiB") as engine:
        assert engine.config == Config(kv_dir=select_all.kv_dir, kv_memory="64MiB")
    with pytest.raises(ConfigError, match="unknown config key 'select_token'; did you mean 'select_tokens'"):
        load(loaded, select_token=500)


@pytest.mark.parametrize("check_quality", [False, True])
def test_quality_is_checked_on_request(loaded, select_all, check_quality):
    with load(loaded, select_all, check_quality=check_quality) as engine:
        list(engine.ask("Who?", [DOCUMENT], max_new_tokens=3))
    assert (engine.stats.quality is not None) == check_quality


def test_new_conversation_forgets_the_turns(engine):
    list(engine.ask("Who?", [DOCUMENT], max_new_tokens=3))
    engine.new_conversation()
    list(engine.ask("Who?", max_new_tokens=3))
    assert engine.stats.stored_tokens == 0 and engine.stats.prompt_tokens < 60


def test_full_method_has_no_limit_and_no_disk(loaded):
    with load(loaded, method=find("full")) as engine:
        list(engine.ask("Who?", [DOCUMENT], max_new_tokens=5))
    stats = engine.stats
    assert (stats.kv_memory_limit_bytes, stats.disk_read_bytes, stats.disk_write_bytes) == (None, 0, 0)
    assert (stats.backend, stats.method) == ("none", "full")
    assert stats.kv_memory_peak_bytes == stats.kv_full_bytes > 0


def test_closing_the_iterator_ends_the_thread_and_the_conversation_goes_on(engine, loaded, monkeypatch):
    monkeypatch.setattr(loaded.model.generation_config, "sequence_bias", only_spaces(loaded.tokenizer))
    answer = engine.ask("Who?", [DOCUMENT], max_new_tokens=2000)
    next(answer)
    with pytest.raises(InputError, match="still being read"):
        next(engine.ask("What?"))
    with pytest.raises(InputError, match="still being read"):
        engine.close()
    answer.close()
    assert threading.active_count() == 1 or all(t.name != "kvswap-generate" for t in threading.enumerate())
    assert engine.stats.finish_reason == "interrupted"
    list(engine.ask("What?", max_new_tokens=3))
    assert engine.stats.stored_tokens > 0


def test_interrupt_in_the_middle_of_a_prompt(loaded, select_all):
    seen: list[int] = []

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "prefill":
            seen.append(done)
            if len(seen) == 2:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                threading.Event().wait(0.2)

    with load(loaded, select_all, on_progress=interrupt) as engine:
        with pytest.raises(KeyboardInterrupt):
            list(engine.ask("Who?", [Document("a", DOCUMENT.text * 3)], max_new_tokens=3))
        assert 2 <= len(seen) <= 3
        assert all(thread.name != "kvswap-generate" for thread in threading.enumerate())
        list(engine.ask("Who?", [DOCUMENT], max_new_tokens=3))
        assert engine.stats.stored_tokens == 0


def test_error_in_the_thread_is_raised_to_the_reader(loaded, select_all):
    def fail(stage: str, done: int, total: int) -> None:
        if stage == "prefill" and armed:
            raise ZeroDivisionError("planted")

    armed = False
    with load(loaded, select_all, on_progress=fail) as engine:
        list(engine.ask("Who?", [DOCUMENT], max_new_tokens=3))
        before = engine.stats.token_ids
        armed = True
        with pytest.raises(ZeroDivisionError, match="planted"):
            list(engine.ask("What?", max_new_tokens=3))
        armed = False
        list(engine.ask("And?", max_new_tokens=3))
        assert engine.stats.stored_tokens == 0
        assert engine.stats.token_ids != [] and before != []


def test_context_past_the_models_limit(engine):
    with pytest.raises(InputError, match=r"8,4\d\d tokens, 2\d\d more than the model's limit of 8,192"):
        next(engine.ask("Who?", [Document("a", "x" * 8400)]))


def test_answer_is_cut_to_the_models_limit(loaded, select_all):
    notices: list[str] = []
    with load(loaded, select_all.replace(select_tokens=600), on_notice=notices.append) as engine:
        list(engine.ask("Who?", [Document("a", "x" * 8130)], max_new_tokens=500))
    assert engine.stats.prompt_tokens + engine.stats.new_tokens <= 8193
    assert "leaves room" in notices[0]


def test_limit_too_small_says_what_works(loaded, tmp_path):
    with (
        load(loaded, Config(kv_memory="64KiB", kv_dir=str(tmp_path))) as engine,
        pytest.raises(MemoryBudgetError, match="set kv_memory to at least"),
    ):
        list(engine.ask("Who?", [DOCUMENT]))


def test_sampling_repeats_with_a_seed_and_leaves_the_callers_alone(loaded, select_all):
    answers = []
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    for _ in range(2):
        with load(loaded, select_all) as engine:
            list(engine.ask("Who?", max_new_tokens=20, temperature=1.0, top_p=0.9, seed=5))
            answers.append(engine.stats.token_ids)
    assert answers[0] == answers[1]
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("bad", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}])
def test_bad_sampling_is_refused(engine, bad):
    with pytest.raises(ConfigError):
        engine.ask("Who?", **bad)


def test_empty_question_and_missing_document(engine, tmp_path):
    with pytest.raises(InputError, match="question is empty"):
        next(engine.ask("  "))
    with pytest.raises(InputError, match="no such file"):
        next(engine.ask("Who?", [tmp_path / "absent.txt"]))


def test_closing_gives_the_model_back(loaded, select_all):
    with load(loaded, select_all) as engine:
        list(engine.ask("Who?", max_new_tokens=2))
    assert all("forward" not in layer.__dict__ for layer in loaded.model.model.layers)
    with pytest.raises(InputError, match="closed"):
        next(engine.ask("Who?"))
