"""``kvswap run --session``: creates a session, continues it, and computes only what is new."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvswap.cli.main import run_command

pytestmark = pytest.mark.usefixtures("cache_home")


@pytest.fixture
def story(tmp_path) -> Path:
    file = tmp_path / "story.txt"
    file.write_text("".join(f"In chapter {number} the king of place {number} counts. " for number in range(22)))
    return file


@pytest.fixture
def run(tiny, story, tmp_path, capfd):
    """Runs a question in a session; returns the numbers."""

    def call(question: str, *words: str, session: str = "tale", document: bool = True) -> dict[str, Any]:
        target = tmp_path / "numbers.json"
        base = ["run", "--model", tiny, "--ask", question, "--max-new-tokens", "6", "--kv-dir", tmp_path / "kv"]
        base += ["--document", story] if document else []
        base += ["--session", session, "--stats-json", target]
        code = run_command([*map(str, base), *words])
        out, err = capfd.readouterr()
        assert code == 0, err
        stats: dict[str, Any] = json.loads(target.read_text())
        assert out == stats["text"] + "\n"
        return {**stats, "err": err}

    return call


def test_second_question_about_the_same_document(run) -> None:
    first = run("Who counts?")
    assert (first["session"], first["resumed_tokens"]) == ("tale", 0)
    assert first["computed_tokens"] == first["prompt_tokens"] > 900
    second = run("What is counted?")
    assert second["resumed_tokens"] + second["computed_tokens"] == second["prompt_tokens"]
    assert second["computed_tokens"] < 60 and second["resumed_tokens"] % 4 == 0
    stored = first["prompt_tokens"] + first["new_tokens"] - 1
    kept = f"this prompt begins with {second['resumed_tokens']:,} of its {stored:,} tokens; these stay"
    assert kept in second["err"]
    assert second["session_written_bytes"] > first["session_written_bytes"]


def test_conversation_continues_without_a_document(run) -> None:
    first = run("Who counts?")
    second = run("And what?", document=False)
    assert second["resumed_tokens"] == first["prompt_tokens"] + first["new_tokens"] - 1
    assert second["prompt_tokens"] > first["prompt_tokens"] + first["new_tokens"]
    third = run("Why?", document=False)
    assert third["resumed_tokens"] == second["prompt_tokens"] + second["new_tokens"] - 1


def test_same_question_again_gives_the_same_answer(run) -> None:
    first, second = run("Who counts?"), run("Who counts?")
    assert second["token_ids"] == first["token_ids"]
    assert second["computed_tokens"] <= 8


def test_session_is_refused_with_one_line(run, tiny, tmp_path, capfd) -> None:
    base = ["run", "--model", str(tiny), "--ask", "Who?", "--kv-dir", str(tmp_path / "kv")]
    for words, message in (
        (["--session", "../out"], "session name '../out'"),
        (["--session", "a", "--method", "full"], "only kvswap keeps sessions"),
    ):
        assert run_command([*base, *words]) == 2
        assert message in capfd.readouterr().err


def test_failed_start_leaves_no_session(tiny, tmp_path, capfd) -> None:
    words = ["run", "--model", "./absent", "--ask", "Who?", "--session", "a", "--kv-dir", str(tmp_path / "kv")]
    assert run_command(words) == 2
    assert list((tmp_path / "kv" / "sessions").iterdir()) == []


def test_new_session_shares_the_prefix_of_another_one(run) -> None:
    first = run("Who counts?")
    second = run("What is counted?", session="other")
    assert second["session"] == "other" and second["resumed_tokens"] > 900 and second["resumed_tokens"] % 4 == 0
    assert second["resumed_tokens"] + second["computed_tokens"] == second["prompt_tokens"]
    assert f"session other shares its first {second['resumed_tokens']:,} tokens with session tale" in second["err"]
    assert second["session_written_bytes"] < first["session_written_bytes"] / 2
    third = run("And what?", session="other", document=False)
    assert third["resumed_tokens"] == second["prompt_tokens"] + second["new_tokens"] - 1
