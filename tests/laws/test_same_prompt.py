"""Law: the same prompt gives the same answer, however much of it is stored and whatever the session went through.

Tokens of a prompt attend to keys and values as they are stored. So a prompt that is computed at once, in pieces, or
behind a stored beginning differs in the order of sums alone: logits of tiny models agree to 1e-5. Where nothing stored
is computed again (close and open, fork, undo, export and import), everything is the same to the last bit.
"""

from __future__ import annotations

import functools
import itertools
import random
from pathlib import Path

import pytest
import torch

from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.errors import SessionError
from kvswap.models.adapter import cache_keyword
from kvswap.models.loading import LoadedModel
from kvswap.models.streaming import end_tokens
from kvswap.sessions.catalog import session_path
from kvswap.sessions.export_import import export_session, import_session
from kvswap.sessions.session import Session
from tests.helpers.families import FAMILIES, given, tiny_model, tokens
from tests.helpers.folders import byte_tokenizer

NUMBERS = itertools.count()
STEPS = ["append", "ask", "ask", "ask", "undo", "truncate", "fork", "reopen", "transfer"]
SELECTING = Config(select_tokens=56, recent_tokens=16, sink_tokens=4, kv_memory="4MiB")
EVERYTHING = SELECTING.replace(select_tokens=2000, kv_memory="16MiB")
TIE = 1e-4  # logits that differ by less are told apart by the order of sums


@pytest.fixture(autouse=True)
def _cache_home(cache_home: Path) -> None:
    """Calibrations are shared by the tests of this run."""


# ---- how much of a prompt is stored


@torch.no_grad()
def last_logits(model, ids: torch.Tensor, pieces: list[int], config: Config) -> torch.Tensor:
    """Logits after a prompt that is given in pieces, which end after so many tokens each."""
    with attach(model, config) as cache, cache.prompt():
        for start, stop in itertools.pairwise([0, *pieces, ids.shape[1]]):
            logits = model(input_ids=ids[:, start:stop], use_cache=True, **given(model, cache)).logits[:, -1]
    return logits


@pytest.mark.parametrize("store_dtype", ["auto", "bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_prompt_agree_however_much_is_stored(family: str, store_dtype: str, tmp_path: Path) -> None:
    model, ids = tiny_model(family), tokens(2, 1103)
    config = SELECTING.replace(kv_dir=str(tmp_path), store_dtype=store_dtype)
    whole = last_logits(model, ids, [], config)
    for pieces in ([1102], [1100, 1101, 1102], [600], [3, 514, 1099]):
        torch.testing.assert_close(last_logits(model, ids, pieces, config), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_generate_computes_the_last_token_of_a_stored_prompt_exactly(family: str, tmp_path: Path) -> None:
    """Selection would change the logits a thousand times as much."""
    model, ids = tiny_model(family), tokens(1, 700)
    config = SELECTING.replace(kv_dir=str(tmp_path))
    asked = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with attach(model, config) as cache:
        first = model.generate(ids, **asked, **given(model, cache))
        for kept in (699, 698, 333, 1):
            cache.truncate(kept)
            again = model.generate(ids, **asked, **given(model, cache))
            torch.testing.assert_close(torch.stack(again.logits), torch.stack(first.logits), rtol=0, atol=1e-5)
            assert torch.equal(again.sequences, first.sequences) and cache.get_seq_length() == 711
        cache.truncate(699)
        with torch.no_grad():  # a step outside of generate is a decode step
            step = model(input_ids=ids[:, 699:], use_cache=True, **given(model, cache)).logits[:, -1]
        assert (step - first.logits[0]).abs().max() > 1e-2


def test_a_token_that_is_appended_alone_is_exact(tmp_path: Path) -> None:
    """A forward of one token behind stored ones would be a decode step, whose K, V come from selected groups."""
    model, found = loaded("llama", 0), []
    ids = tokens(1, 190)[0].tolist()
    hook = model.model.lm_head.register_forward_hook(lambda module, given, output: found.append(output[0, -1]))
    try:
        for number, stops in enumerate(([190], [188, 189, 190])):
            with Session.create(f"alone-{number}", model, SELECTING.replace(kv_dir=str(tmp_path))) as session:
                for start, stop in itertools.pairwise([0, *stops]):
                    session.append(ids[start:stop])
                found.clear()
                list(session.generate(max_new_tokens=1))
                if number == 0:
                    expected = found[0]
    finally:
        hook.remove()
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)


# ---- whatever the session went through


@functools.cache
def loaded(family: str, number: int) -> LoadedModel:
    """The same model, as often as it has to be attached at a time."""
    return LoadedModel(tiny_model(family, vocab_size=300), byte_tokenizer(), f"tiny-{family}")


def fresh_answer(family: str, ids: list[int], count: int, config: Config) -> list[int]:
    """The answer of a new context that is given all of ``ids`` at once."""
    model, tokenizer = loaded(family, 1).model, loaded(family, 1).tokenizer
    with attach(model, config, tokenizer=tokenizer) as cache:
        asked = {"max_new_tokens": count, "do_sample": False, "eos_token_id": end_tokens(model, tokenizer)}
        given_ids = torch.tensor([ids])  # generated ones may look like padding
        given_mask = torch.ones_like(given_ids)
        output = model.generate(given_ids, attention_mask=given_mask, **asked, **{cache_keyword(model): cache})
    return output[0, len(ids) :].tolist()


def is_tie(family: str, ids: list[int], one: list[int], other: list[int]) -> bool:
    """Whether the first tokens in which two answers differ have logits that are the same but for rounding."""
    at = next(n for n, (a, b) in enumerate(itertools.zip_longest(one, other)) if a != b)
    with torch.no_grad():
        logits = loaded(family, 1).model(torch.tensor([[*ids, *one[:at]]])).logits[0, -1]
    return at < min(len(one), len(other)) and bool((logits[one[at]] - logits[other[at]]).abs() < TIE)


class Walk:
    """One session on a random walk. Whenever it is asked, the question is repeated, and a new context is asked too.

    K, V of generated tokens come from steps with selection, and those of a new context do not. So a new context is
    comparable where everything is selected, or where nothing in the session's context was generated. The same holds for
    what is computed again after a cut.
    """

    def __init__(self, family: str, config: Config, seed: int) -> None:
        self.family, self.config, self.dice = family, config, random.Random(seed)
        self.model, self.answers, self.compared = loaded(family, 0), 0, 0
        self.generated: set[tuple[int, ...]] = set()  # contexts whose last token was generated
        self.session = Session.create(f"s{next(NUMBERS)}", self.model, config)

    def run(self, steps: int) -> None:
        try:
            self.append(190)
            for _ in range(steps):
                getattr(self, self.dice.choice(STEPS))(self.dice.randint(1, 130))
                if not self.session.token_ids:
                    self.append(30)
            self.ask(5)
        finally:
            self.session.close()

    def append(self, size: int) -> None:
        self.session.append(tokens(1, size, seed=self.dice.randrange(999))[0].tolist())

    def ask(self, size: int) -> None:
        prompt, count = self.session.token_ids, 1 + size % 12
        if len(prompt) == self.session.tokens:  # cut to whole groups: its last token is computed already
            self.append(1)
            prompt = self.session.token_ids
        answer = self.generate(count)
        exact = self.config.select_tokens == EVERYTHING.select_tokens or not self.has_generated(prompt)
        if exact:
            fresh = fresh_answer(self.family, prompt, count, self.config)
            assert answer == fresh or is_tie(self.family, prompt, answer, fresh)
            self.compared += 1
        if self.dice.choice(["undo", "recut"]) == "undo" or not (exact or self.keeps_generated(prompt)):
            self.undo(0, prompt)
        else:
            self.recut(0, prompt)
        getattr(self, self.dice.choice(["stay", "fork", "reopen", "transfer"]))(1)
        assert self.session.token_ids == prompt
        assert self.generate(count) == answer
        self.answers += 1
        if self.dice.random() < 0.5:
            self.undo(0, prompt)
            return
        self.generated |= {tuple(self.session.token_ids[: len(prompt) + n + 1]) for n in range(len(answer))}

    def has_generated(self, ids: list[int]) -> bool:
        return self.generated_after(0, ids)

    def keeps_generated(self, prompt: list[int]) -> bool:
        """Whether no token is computed again after ``recut`` whose K, V a step with selection has made.

        A cut keeps whole groups. The prompt's last token does not count: it is computed when the prompt is asked.
        """
        kept = self.session.common_tokens(prompt) // self.config.group_tokens * self.config.group_tokens
        return not self.generated_after(kept, prompt[:-1])

    def generated_after(self, kept: int, ids: list[int]) -> bool:
        return any(tuple(ids[:count]) in self.generated for count in range(kept + 1, len(ids) + 1))

    def generate(self, count: int) -> list[int]:
        before = len(self.session.token_ids)
        list(self.session.generate(max_new_tokens=count))
        return self.session.token_ids[before:]

    def undo(self, size: int, prompt: list[int] | None = None) -> None:
        try:
            self.session.undo()
        except SessionError as error:
            assert prompt is None and ("not kept" in str(error) or "nothing" in str(error))

    def recut(self, size: int, prompt: list[int]) -> None:
        """Ask the prompt again of a session that stores the answer as well."""
        self.session.truncate(self.session.common_tokens(prompt))
        self.session.append(prompt[len(self.session.token_ids) :])

    def truncate(self, size: int) -> None:
        self.session.truncate(len(self.session.token_ids) - size)

    def stay(self, size: int) -> None: ...

    def reopen(self, size: int) -> None:
        self.session.commit(self.session.token_ids)
        name = self.session.name
        self.session.close()
        self.session = Session.open(name, self.model, self.config)

    def fork(self, size: int) -> None:
        name = f"s{next(NUMBERS)}"
        self.session.commit(self.session.token_ids)
        self.session.fork(name)
        self.session.close()
        self.session = Session.open(name, self.model, self.config)

    def transfer(self, size: int) -> None:
        name, kv_dir = f"s{next(NUMBERS)}", self.config.kv_dir
        self.session.commit(self.session.token_ids)
        archive = Path(kv_dir) / f"{name}.kvswap"
        export_session(self.session.store, archive)
        self.session.close()
        import_session(archive, session_path(kv_dir, name))
        self.session = Session.open(name, self.model, self.config)


def walk(family: str, config: Config, seed: int, folder: Path) -> None:
    found = Walk(family, config.replace(kv_dir=str(folder)), seed)
    found.run(steps=4)
    assert found.answers and (found.compared or config is SELECTING)


@pytest.mark.parametrize("config", [SELECTING, EVERYTHING], ids=["selecting", "everything"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_same_prompt_gets_the_same_answer(family: str, config: Config, tmp_path: Path) -> None:
    for seed in range(5):
        walk(family, config, seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("config", [SELECTING, EVERYTHING], ids=["selecting", "everything"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_same_prompt_gets_the_same_answer_in_many_schedules(family: str, config: Config, tmp_path: Path) -> None:
    for seed in range(100, 150):
        walk(family, config, seed, tmp_path)
