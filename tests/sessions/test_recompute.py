"""Recomputing what a session stores: the same tokens as loading it, and nothing is read or written twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvswap.cli.main import run_command
from kvswap.config import Config
from kvswap.core.load_or_recompute import Rates
from kvswap.errors import UnsupportedError
from kvswap.sessions.catalog import open_store
from kvswap.sessions.check import check
from kvswap.sessions.session import Session
from tests.helpers.families import tokens
from tests.helpers.folders import save_tiny
from tests.laws.test_resume import loaded

PROMPT, MORE = tokens(1, 603)[0].tolist(), tokens(1, 41, seed=3)[0].tolist()
SLOW_DISK = Rates(prefill_tokens=4000, prefill_us=1000, load_tokens=1000, load_us=60_000_000)


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(select_tokens=4000, store_dtype="float32", kv_memory="64MiB", kv_dir=str(tmp_path / "kv"))


def play(name: str, config: Config, *, recompute: bool, reopen: bool) -> tuple[list[int], int, int]:
    """Token ids at the end, bytes streamed by the append, bytes of data written."""
    with Session.create(name, loaded("llama"), config) as session:
        session.append(PROMPT)
        list(session.generate(max_new_tokens=3))
    session = Session.open(name, loaded("llama"), config)
    if not reopen:
        session.append([5, 6])  # the cache is attached and has a state
    whole = [*session.token_ids, *MORE]
    written = session.cache.stats.disk_write_bytes
    if recompute:
        session.cache.recompute()
        assert session.tokens == 0
    session._forward(whole[session.tokens : -1])
    streamed = session.cache._state.store.streamed_bytes
    session.commit(whole)
    list(session.generate(max_new_tokens=20))
    assert check(session.store).problems == []
    written = session.cache.stats.disk_write_bytes - written
    session.close()
    with Session.open(name, loaded("llama"), config) as session:
        list(session.generate(max_new_tokens=10))
        return session.token_ids, streamed, written


@pytest.mark.parametrize("reopen", [True, False])
def test_same_tokens_whether_loaded_or_recomputed(reopen, config) -> None:
    loaded_ids, streamed, written = play("loaded", config, recompute=False, reopen=reopen)
    recomputed_ids, none, same = play("recomputed", config, recompute=True, reopen=reopen)
    assert recomputed_ids == loaded_ids
    assert (streamed > 0) == reopen and none == 0 and same == written  # what was written just now is in memory


def test_sliding_windows_are_never_recomputed(config) -> None:
    with Session.create("s", loaded("gemma3"), config) as session:
        session.append(PROMPT)
        session.store.publish(replace(session.store.manifest, rates=SLOW_DISK))
        assert not session.load_or_recompute(len(PROMPT) + 40).recompute
        with pytest.raises(UnsupportedError, match="sliding-window"):
            session.cache.recompute()


@pytest.mark.usefixtures("groups_are_read")
def test_rates_are_measured_kept_and_left_behind(config, tmp_path) -> None:
    from kvswap.sessions.export_import import export_session, import_session

    with Session.create("s", loaded("llama"), config) as session:
        session.append(PROMPT)
        first = session.store.manifest.rates
        assert first.prefill_tokens == len(PROMPT) - 1 and first.prefill_us > 0 and first.load_tokens == 0
        assert session.load_or_recompute(len(PROMPT) + 40).load_s is None
        session.append(MORE)
        second = session.store.manifest.rates
        assert second.load_tokens >= 512 and (second.prefill_tokens, second.prefill_us) == (602, first.prefill_us)
        found = session.load_or_recompute(len(session.token_ids) + 40)
        assert found.load_s is not None and found.recompute_s is not None
        export_session(session.store, tmp_path / "s.kvswap")
    import_session(tmp_path / "s.kvswap", tmp_path / "kv" / "sessions" / "there")
    with Session.open("there", loaded("llama"), config) as session:  # another machine, perhaps
        assert session.store.manifest.rates is None


def test_run_recomputes_where_the_disk_is_slow(tmp_path, capfd) -> None:
    model = save_tiny(tmp_path / "tiny", max_position_embeddings=2048)
    (tmp_path / "story.txt").write_text("".join(f"In chapter {n} the king of place {n} counts. " for n in range(22)))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"select_tokens": 4000, "store_dtype": "float32", "kv_memory": "64MiB"}))

    def run(question: str, name: str, *words: object) -> dict[str, Any]:
        base = ["run", "--model", model, "--ask", question, "--max-new-tokens", 6, "--kv-dir", tmp_path / "kv"]
        base += ["--session", name, "--config", config, "--stats-json", tmp_path / "n.json", *words]
        assert run_command([str(word) for word in base]) == 0
        return {**json.loads((tmp_path / "n.json").read_text()), "err": capfd.readouterr().err}

    run("Who counts?", "a", "--document", tmp_path / "story.txt")
    with open_store(str(tmp_path / "kv"), "a") as store:
        from kvswap.sessions.sharing import fork

        fork(store, store.folder.path.with_name("b"))
        store.publish(replace(store.manifest, rates=SLOW_DISK))
    again, read = run("And what?", "a"), run("And what?", "b")
    assert again["token_ids"] == read["token_ids"] and again["prompt_tokens"] == read["prompt_tokens"]
    assert again["computed_again"] and (again["resumed_tokens"], again["computed_tokens"]) == (
        0,
        again["prompt_tokens"],
    )
    assert not read["computed_again"] and read["resumed_tokens"] > 900
    assert again["load_expected_s"] > again["recompute_expected_s"] > 0
    assert "(computed again: " in again["err"] and "(read: " not in read["err"]
    third = run("Why?", "a")
    assert third["prompt_tokens"] > again["prompt_tokens"]
    assert sorted(third["text"]) == sorted(run("Why?", "b")["text"])
