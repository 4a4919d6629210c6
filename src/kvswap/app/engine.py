"""Text in, text out: a model, its cache and one conversation.

``load`` gives an ``Engine``. ``Engine.ask`` streams an answer and remembers the turn, so that the next ``ask`` computes
only what is new. One answer at a time; an engine belongs to one thread (generation runs in a second thread, which ends
before ``ask`` does). With a session, prompt and answer are durable when they are complete. Without one, closing the
engine drops the cache. Closing always gives the model back as it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from kvswap.app.context import Context
from kvswap.app.documents import Document, read_document
from kvswap.app.prompt import (
    Conversation,
    Message,
    Prompt,
    check_length,
    make_request,
    read_messages,
    room_for_answer,
    with_system,
)
from kvswap.app.quality import QualityMeter
from kvswap.app.sources import find_sources
from kvswap.app.stats import RunStats, answer_numbers, blank_stats, resolved_config
from kvswap.config import Config
from kvswap.core.cache import KVSwapCache
from kvswap.core.cache_stats import CacheStats
from kvswap.core.layer_major import InMemory, Progress
from kvswap.errors import InputError, SessionError, on_error
from kvswap.memory.available import peak_rss_bytes
from kvswap.models.adapter import check_token_ids, context_limit
from kvswap.models.generation_config import remarks
from kvswap.models.loading import LoadedModel, load_model
from kvswap.models.logprobs import Logprobs
from kvswap.models.sampling import Sampling
from kvswap.models.streaming import Generation
from kvswap.selection.kvswap import method as own_method
from kvswap.selection.method import Method
from kvswap.sessions.catalog import open_or_create_store
from kvswap.sessions.commits import SessionStore
from kvswap.sessions.quota import Limits
from kvswap.sessions.session import Session
from kvswap.sessions.sharing import common_tokens

SOURCES = 10
LEAST_MASS = 0.6
"""Below this estimate an answer comes with a warning: KL was 0.05 nats and more there (docs/quality.md)."""
_STILL_READING, _READ_ON = "an answer is still being read", "read it to its end or close its iterator first"


def load(
    model: str | LoadedModel,
    config: Config | None = None,
    *,
    method: Method | InMemory | None = None,
    dtype: str = "auto",
    weights: str = "auto",
    mmap: bool = True,
    session: str | SessionStore | None = None,
    verify: bool = True,
    limits: Limits | None = None,
    check_quality: bool = False,
    sources: int = SOURCES,
    on_progress: Progress | None = None,
    on_notice: Callable[[str], None] | None = None,
    **settings: Any,
) -> Engine:
    """Load a model and put its cache on disk.

    Parameters
    ----------
    model
        Local directory, ``.gguf`` file, hub id or ``smollm2-135m``; or what ``load_model`` gave.
    config, settings
        A ``Config``, and single keys of it that override it: ``load(model, kv_memory="24MiB")``.
    method
        A method to compare with, as ``kvswap.lab.rivals.find`` gives it; None is kvswap's own.
    dtype, weights, mmap
        As for ``load_model``.
    session
        Name of a session below ``config.kv_dir``, which is created or continued; or the store of one that is open.
    verify
        Whether groups of a session are compared with their checksums when they are read.
    limits
        How much disk sessions may take, and how much may be written a day.
    check_quality
        Repeat some steps with exact attention; ``Engine.stats.quality`` says what selection costs.
    sources
        How many passages ``Engine.stats.sources`` has at most.
    on_progress, on_notice
        Called with ``("calibrate" | "prefill", done, total)``, and with a notice where something falls back.

    Raises
    ------
    ModelError, ConfigError, StorageError, SessionError
    """
    config = (config or Config()).replace(**settings)
    notice = on_notice or logging.getLogger("kvswap").warning
    if isinstance(model, str):
        model = load_model(model, dtype=dtype, weights=weights, mmap=mmap, on_notice=notice)
    if isinstance(session, str):
        session = open_or_create_store(config.kv_dir, session)
    told: dict[str, Any] = {"check_quality": check_quality, "sources": sources}
    told |= {"on_progress": on_progress, "on_notice": notice}
    return Engine(model, config, method=method, session=session, verify=verify, limits=limits, **told)


class Engine:
    """One conversation with one model. Close it, or use it in a ``with`` block. Arguments are those of ``load``.

    ``share`` and ``piece_tokens`` are as for ``Context``. ``session`` is closed, also when the constructor fails.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: Config,
        *,
        method: Method | InMemory | None = None,
        session: SessionStore | None = None,
        verify: bool = True,
        limits: Limits | None = None,
        check_quality: bool = False,
        sources: int = SOURCES,
        share: bool = True,
        piece_tokens: int | None = None,
        on_progress: Progress | None = None,
        on_notice: Callable[[str], None] | None = None,
    ) -> None:
        self.config, self.method = config, method or own_method()
        self.check_quality, self.sources = check_quality, sources
        self._loaded, self._on_progress, self._on_notice = loaded, on_progress, on_notice
        self._notices: list[str] = []
        self._generation: Generation | None = None
        self._closed = False
        self._conversation = Conversation()
        self._stats = blank_stats(loaded, self.method.name, resolved_config(config, loaded.model, None))
        tell: dict[str, Any] = {"on_progress": self._report, "on_notice": self._notice}
        self._context = Context(loaded, config, self.method, share=share, piece_tokens=piece_tokens, **tell)
        try:
            if session is not None:
                self._context.open_session(session, verify, limits)
                self._read_conversation()
            self._context.open()
            for remark in remarks(loaded.model.generation_config):
                self._notice(remark)
        except BaseException:
            self._context.close()
            raise

    def ask(
        self,
        question: str,
        documents: Sequence[str | Path | Document] = (),
        *,
        system: str | None = None,
        **sampling: Any,
    ) -> Generator[str]:
        """Stream the answer to a question about documents and about what was said before.

        Parameters
        ----------
        documents
            Paths, or ``Document`` objects; they come before the question and stay in the conversation.
        system
            Instructions before everything else. They stay in the conversation until others are given.
        sampling
            The keys of ``Sampling``: ``max_new_tokens``, ``temperature``, ``top_p``, ``top_k``, ``min_p``, ``seed``,
            ``stop``.

        Raises
        ------
        InputError, ConfigError, MemoryBudgetError, StorageError
            At the first step of the iterator, before anything is computed. ConfigError for sampling comes at once.
        DiskError
            When the disk fails. The conversation is then as it was before the question.
        """

        def prompt() -> Prompt:
            texts = [item if isinstance(item, Document) else read_document(item) for item in documents]
            messages = [*self._conversation.messages, make_request(question, texts)]
            return self._prompt(with_system(messages, system), None)

        return self._answer(prompt, Sampling(**sampling))

    def chat(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        logprobs: Logprobs | None = None,
        **sampling: Any,
    ) -> Generator[str]:
        """Stream the answer to a whole conversation, which takes the place of the one before.

        Only what is new is computed: what both begin with stays.

        Parameters
        ----------
        messages
            ``Message`` objects, or mappings with ``role``, ``content`` and keys that the chat template reads.
        tools
            JSON schemas of functions for the chat template.
        logprobs
            Gets the log-probabilities of the answer's tokens.
        sampling
            As for ``ask``, which also says what is raised.
        """
        given = read_messages(messages)
        return self._answer(lambda: self._prompt(given, tools), Sampling(**sampling), logprobs)

    def complete(
        self, text: str | Sequence[int], *, logprobs: Logprobs | None = None, **sampling: Any
    ) -> Generator[str]:
        """Stream what follows a text or token ids, without a chat template. Arguments are as for ``chat``."""
        given = text if isinstance(text, str) else list(text)
        return self._answer(lambda: self._raw_prompt(given), Sampling(**sampling), logprobs)

    @property
    def stats(self) -> RunStats:
        """The numbers of the last answer. While a prompt is read: its tokens, and how many of them were stored."""
        return self._stats

    @property
    def messages(self) -> list[Message]:
        """The conversation so far."""
        return list(self._conversation.messages)

    def shared_tokens(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
    ) -> tuple[int, int]:
        """How many tokens these messages and the conversation begin with, and where its last answer begins."""
        ids, answered = self._conversation.ids, self._conversation.last_prompt_tokens
        return common_tokens(self._prompt(list(messages), tools).ids, ids), answered

    def knows(self, documents: Sequence[Document]) -> bool:
        """Whether the conversation has all of these documents already."""
        return all(
            any(each.text.strip() in message.context for message in self._conversation.messages) for each in documents
        )

    def new_conversation(self) -> None:
        """Begin another conversation. A session keeps the part of its context that the next prompt begins with."""
        self._conversation = Conversation()
        if self.session is None:
            self._rollback()

    @property
    def session(self) -> Session | None:
        """The session that stores the conversation, if any."""
        return self._context.session

    def undo(self) -> None:
        """Take back the last turn of a session. Raises SessionError when there is none."""
        if self.session is None:
            raise SessionError("there is no session to take back a turn of", hint="load with session=NAME")
        self._context.cache = None
        self.session.undo()
        self._read_conversation()

    def close(self) -> None:
        """Drop the cache and give the model back as it was. The engine is of no use afterwards."""
        if self._generation is not None:
            raise InputError(_STILL_READING, hint=_READ_ON)
        self._closed = True
        self._context.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- one question

    def _check_free(self) -> None:
        if self._closed:
            raise InputError("the engine is closed", hint="load the model again")
        if self._generation is not None:
            raise InputError(_STILL_READING, hint=_READ_ON)
        self._loaded.check_weights()

    def _prompt(self, messages: list[Message], tools: Sequence[dict[str, Any]] | None) -> Prompt:
        check_length(self._loaded.tokenizer, messages, context_limit(self._loaded.model))
        return self._conversation.prompt(self._loaded.tokenizer, messages, tools)

    def _raw_prompt(self, text: str | list[int]) -> Prompt:
        given = [Message("user", text)] if isinstance(text, str) else []
        check_length(self._loaded.tokenizer, given, context_limit(self._loaded.model))
        known = text if isinstance(text, str) else check_token_ids(self._loaded.model, text)
        return self._conversation.raw_prompt(self._loaded.tokenizer, known)

    def _answer(
        self, make_prompt: Callable[[], Prompt], sampling: Sampling, logprobs: Logprobs | None = None
    ) -> Generator[str]:
        self._check_free()
        started_s, prompt = time.perf_counter(), make_prompt()
        ids, loaded, context, kept = prompt.ids, self._loaded, self._context, False
        sampling = self._fit(len(check_token_ids(loaded.model, ids)), sampling)
        # Else layers may have different numbers of tokens, and the session what only this question needs.
        with on_error(lambda: None if kept else self._rollback()):
            earlier = self._conversation
            if not context.match(ids, earlier.ids, earlier.to_json(), continues=prompt.continues):
                self._rollback()
            cache = context.open()
            setup_s, calibration_s = context.take_setup_s()
            started_s -= setup_s - calibration_s
            before, stored = cache.stats, cache.get_seq_length()
            self._stats = replace(self._stats, prompt_tokens=len(ids), stored_tokens=stored, new_tokens=0)
            context.prepare(ids, self._conversation.to_json())
            context.begin_tally()
            checked = self.check_quality and isinstance(cache, KVSwapCache)
            meter = QualityMeter(loaded.model, cache) if checked else None
            generation = Generation(loaded.model, loaded.tokenizer, ids, cache, sampling, meter, logprobs=logprobs)
            self._generation = generation
            try:
                yield from generation
            finally:
                self._generation = None
                if generation.error is None:
                    self._add_turn(prompt, generation)
                    kept = True
                    counts = {"prompt_tokens": len(ids), "stored_tokens": stored}
                    stats = self._measure(generation, before, cache.stats, started_s, **counts)
                    self._stats = replace(stats, calibration_s=calibration_s, quality=meter.stats if meter else None)

    def _fit(self, tokens: int, sampling: Sampling) -> Sampling:
        """Sampling with an answer that fits the model's context. Raises InputError where the prompt does not fit."""
        limit = context_limit(self._loaded.model)
        if limit is None or (room := room_for_answer(tokens, limit)) >= sampling.max_new_tokens:
            return sampling
        self._notice(f"the model's limit of {limit:,} tokens leaves room for an answer of {room:,} tokens")
        return replace(sampling, max_new_tokens=room)

    def _add_turn(self, prompt: Prompt, generation: Generation) -> None:
        answer = generation.text if generation.stopped_by else None
        self._conversation.add(self._loaded.tokenizer, prompt, generation.token_ids, answer)
        if self.session is not None:
            self.session.commit(self._conversation.ids, self._conversation.to_json())

    def _read_conversation(self) -> None:
        """Take over the conversation that the session stores."""
        session = self.session
        assert session is not None
        self._conversation = Conversation.from_json(session.conversation, session.token_ids, session.store.label)

    def _rollback(self) -> None:
        """Go back to the last commit of the session. Without a session, drop the cache and keep the messages."""
        self._context.rollback()
        if self.session is not None:
            self._read_conversation()
        else:
            self._conversation = Conversation(self._conversation.messages)

    def _report(self, stage: str, done: int, total: int) -> None:
        if self._generation is not None:
            self._generation.checkpoint()
        if self._on_progress is not None:
            self._on_progress(stage, done, total)

    def _notice(self, text: str) -> None:
        if text not in self._notices:
            self._notices.append(text)
        if self._on_notice is not None:
            self._on_notice(text)

    def _warn_of_loss(self, mass_kept: float | None) -> None:
        if mass_kept is not None and mass_kept < LEAST_MASS:
            self._notice(
                f"the answer attended to an estimated {mass_kept:.0%} of the attention only, so it may differ from "
                "that of full attention; give more kv_memory, or a larger select_tokens where that is fixed"
            )

    def _measure(
        self, generation: Generation, before: CacheStats, after: CacheStats, started_s: float, **counts: int
    ) -> RunStats:
        loaded, cache = self._loaded, after.since(before)
        if isinstance(self.method, InMemory):
            cache["kv_memory_limit_bytes"] = None
        self._warn_of_loss(cache["mass_kept"])
        return replace(
            blank_stats(loaded, self.method.name, resolved_config(self.config, loaded.model, after)),
            **self._context.numbers(counts["stored_tokens"]),
            **answer_numbers(generation, started_s=started_s, **counts),
            sources=find_sources(loaded.tokenizer, self._conversation, self._context.tally, count=self.sources),
            **cache,
            process_peak_rss_bytes=peak_rss_bytes(),
            notices=list(self._notices),
        )
