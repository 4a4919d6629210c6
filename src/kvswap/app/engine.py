"""Text in, text out: a model, its cache and one conversation.

``load`` gives an ``Engine``. ``Engine.ask`` streams an answer and remembers the turn, so that the next ``ask`` computes
only what is new. One answer at a time; an engine belongs to one thread (generation runs in a second thread, which ends
before ``ask`` does). With a session, prompt and answer are durable when they are complete. Without one, closing the
engine drops the cache. Closing always gives the model back as it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from kvswap.app.documents import Document, read_document
from kvswap.app.prompt import Conversation, Request, check_length, make_request, room_for_answer
from kvswap.app.quality import QualityMeter
from kvswap.app.stats import RunStats, blank_stats, latency_percentiles_ms, resolved_config, tokens_per_s
from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.core.cache import KVSwapCache
from kvswap.core.cache_stats import CacheStats
from kvswap.core.layer_major import FullCache, InMemory, Progress
from kvswap.core.load_or_recompute import Choice
from kvswap.errors import InputError, SessionError, UnsupportedError, on_error
from kvswap.memory.available import peak_rss_bytes
from kvswap.models.adapter import check_token_ids, context_limit
from kvswap.models.generation_config import remarks
from kvswap.models.loading import LoadedModel, load_model
from kvswap.models.sampling import Sampling
from kvswap.models.streaming import Generation
from kvswap.selection.kvswap import method as own_method
from kvswap.selection.method import Method
from kvswap.sessions.catalog import open_or_create_store
from kvswap.sessions.commits import SessionStore
from kvswap.sessions.quota import Limits
from kvswap.sessions.session import Session
from kvswap.sessions.sharing import common_tokens


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
    return Engine(
        model,
        config,
        method=method,
        session=session,
        verify=verify,
        limits=limits,
        check_quality=check_quality,
        on_progress=on_progress,
        on_notice=notice,
    )


class Engine:
    """One conversation with one model. Close it, or use it in a ``with`` block. Arguments are those of ``load``.

    The engine closes ``session``, also when the constructor fails.
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
        on_progress: Progress | None = None,
        on_notice: Callable[[str], None] | None = None,
    ) -> None:
        self.config, self.method, self.check_quality = config, method or own_method(), check_quality
        self._loaded, self._on_progress, self._on_notice = loaded, on_progress, on_notice
        self._notices: list[str] = []
        self._stack = ExitStack()
        self._cache: KVSwapCache | FullCache | None = None
        self._generation: Generation | None = None
        self._setup_s = self._calibration_s = 0.0
        self._closed, self._choice = False, Choice()
        self._conversation = Conversation()
        self._session: Session | None = None
        self._stats = blank_stats(loaded, self.method.name, resolved_config(config, loaded.model, None))
        try:
            if session is not None:
                self._open_session(session, verify, limits)
            self._open_cache()
            for remark in remarks(loaded.model.generation_config):
                self._notice(remark)
        except BaseException:
            self._stack.close()
            raise

    def ask(
        self,
        question: str,
        documents: Sequence[str | Path | Document] = (),
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Stream the answer to a question about documents and about what was said before.

        Parameters
        ----------
        documents
            Paths, or ``Document`` objects; they come before the question and stay in the conversation.
        temperature, top_p, seed
            Temperature 0 takes the likeliest token each time.

        Raises
        ------
        InputError, ConfigError, MemoryBudgetError, StorageError
            At the first step of the iterator, before anything is computed.
        DiskError
            When the disk fails. The conversation is then as it was before the question.
        """
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        return self._ask(question, documents, sampling)

    @property
    def stats(self) -> RunStats:
        """The numbers of the last answer."""
        return self._stats

    def knows(self, documents: Sequence[Document]) -> bool:
        """Whether the conversation has all of these documents already."""
        return all(
            any(each.text.strip() in turn.request.context for turn in self._conversation.turns) for each in documents
        )

    def new_conversation(self) -> None:
        """Begin another conversation. A session keeps the part of its context that the next prompt begins with."""
        self._conversation = Conversation()
        if self._session is None:
            self._rollback()

    @property
    def session(self) -> Session | None:
        """The session that stores the conversation, if any."""
        return self._session

    def undo(self) -> None:
        """Take back the last turn of a session. Raises SessionError when there is none."""
        if self._session is None:
            raise SessionError("there is no session to take back a turn of", hint="load with session=NAME")
        self._cache = None
        self._session.undo()
        self._read_conversation()

    def close(self) -> None:
        """Drop the cache and give the model back as it was. The engine is of no use afterwards."""
        if self._generation is not None:
            raise InputError("an answer is still being read", hint="read it to its end or close its iterator first")
        self._closed = True
        self._cache = None
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- one question

    def _ask(self, question: str, documents: Sequence[str | Path | Document], sampling: Sampling) -> Iterator[str]:
        if self._closed:
            raise InputError("the engine is closed", hint="load the model again")
        if self._generation is not None:
            raise InputError("an answer is still being read", hint="read it to its end or close its iterator first")
        self._loaded.check_weights()
        started_s = time.perf_counter()
        texts = [item if isinstance(item, Document) else read_document(item) for item in documents]
        request = make_request(question, texts)
        check_length(self._loaded.tokenizer, request, context_limit(self._loaded.model))
        text, ids, continues = self._conversation.prompt(self._loaded.tokenizer, request)
        sampling = self._fit(len(check_token_ids(self._loaded.model, ids)), sampling)
        kept = False
        # Else layers may have different numbers of tokens, and the session what only this question needs.
        with on_error(lambda: None if kept else self._rollback()):
            self._match_context(ids, continues)
            cache = self._cache or self._open_cache()
            started_s -= self._setup_s - self._calibration_s
            before, stored = cache.stats, cache.get_seq_length()
            if self._session is not None:
                self._session.commit_prompt(ids, self._conversation.to_json())
            checked = self.check_quality and isinstance(cache, KVSwapCache)
            meter = QualityMeter(self._loaded.model, cache) if checked else None
            generation = Generation(self._loaded.model, self._loaded.tokenizer, ids, cache, sampling, meter)
            self._generation = generation
            try:
                yield from generation
            finally:
                self._generation = None
                if generation.error is None:
                    self._add_turn(request, text, ids, generation.token_ids)
                    kept = True
                    stats = self._measure(generation, ids, stored, started_s, before, cache.stats)
                    self._stats = replace(stats, quality=meter.stats if meter else None)
                    self._setup_s = self._calibration_s = 0.0

    def _match_context(self, ids: list[int], continues: bool) -> None:
        """See that what is stored is the beginning of the prompt ``ids``: take back what is not."""
        if self._session is not None:
            return self._match_session(self._session, ids)
        cache, why = self._cache, "the chat template rewrites earlier turns"
        stored = cache.get_seq_length() if cache is not None and not continues else 0
        kept = common_tokens(ids, self._conversation.ids[:stored])
        if kept == stored:
            return
        if kept and isinstance(cache, KVSwapCache) and cache.can_truncate:
            cache.truncate(kept)
            return self._notice(f"{why}: of {stored:,} tokens the first {kept:,} stay, the rest is computed anew")
        self._notice(f"{why}, so the whole conversation is computed anew")
        self._rollback()

    def _match_session(self, session: Session, ids: list[int]) -> None:
        source = session.share_prefix(ids, self._conversation.to_json())
        before = session.tokens
        kept = session.truncate(session.common_tokens(ids))
        self._cache = session.cache
        self._choice = session.load_or_recompute(len(ids))
        if self._choice.recompute:
            session.cache.recompute()
        if source is not None:
            self._notice(f"{session.store.label} shares its first {kept:,} tokens with session {source}")
        if kept < before:
            self._notice(
                f"{session.store.label}: this prompt begins with {kept:,} of its {before:,} tokens; these stay"
            )

    def _fit(self, tokens: int, sampling: Sampling) -> Sampling:
        """Sampling with an answer that fits the model's context. Raises InputError where the prompt does not fit."""
        limit = context_limit(self._loaded.model)
        if limit is None or (room := room_for_answer(tokens, limit)) >= sampling.max_new_tokens:
            return sampling
        self._notice(f"the model's limit of {limit:,} tokens leaves room for an answer of {room:,} tokens")
        return replace(sampling, max_new_tokens=room)

    def _add_turn(self, request: Request, text: str, ids: list[int], answer_ids: list[int]) -> None:
        self._conversation.add(self._loaded.tokenizer, request, text, ids, answer_ids)
        if self._session is not None:
            self._session.commit(self._conversation.ids, self._conversation.to_json())

    # ---- the session

    def _open_session(self, store: SessionStore, verify: bool, limits: Limits | None) -> None:
        try:
            if self.method.name != own_method().name:
                raise UnsupportedError(f"a session with method {self.method.name}", hint="only kvswap keeps sessions")
            tell: dict[str, Any] = {"on_progress": self._report, "on_notice": self._notice}
            self._session = Session(store, self._loaded, self.config, verify=verify, limits=limits, **tell)
        except BaseException:
            store.close(discard_empty=True)
            raise
        self._stack.callback(self._session.close, discard_empty=True)
        self._read_conversation()

    def _read_conversation(self) -> None:
        """Take over the conversation that the session stores."""
        session = self._session
        assert session is not None
        self._conversation = Conversation.from_json(session.conversation, session.token_ids, session.store.label)

    # ---- the cache

    def _open_cache(self) -> KVSwapCache | FullCache:
        started_s = time.perf_counter()
        if self._session is not None:
            self._cache = self._session.cache
        else:
            tell: dict[str, Any] = {"on_progress": self._report, "on_notice": self._notice}
            options = {"tokenizer": self._loaded.tokenizer, "method": self.method, **tell}
            self._cache = self._stack.enter_context(attach(self._loaded.model, self.config, **options))
        self._setup_s = time.perf_counter() - started_s
        self._calibration_s = self._cache.trace.calibration_s
        return self._cache

    def _rollback(self) -> None:
        """Go back to the last commit of the session. Without a session, drop the cache and keep the turns."""
        self._cache = None
        if self._session is not None:
            self._session.rollback()
            self._read_conversation()
        else:
            self._conversation = Conversation(self._conversation.turns)
            self._stack.close()

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

    # ---- numbers

    def _measure(
        self,
        generation: Generation,
        ids: list[int],
        stored: int,
        started_s: float,
        before: CacheStats,
        after: CacheStats,
    ) -> RunStats:
        loaded, times_s, token_ids = self._loaded, generation.times_s, generation.token_ids
        cache = after.since(before)
        if isinstance(self.method, InMemory):
            cache["kv_memory_limit_bytes"] = None
        return replace(
            blank_stats(loaded, self.method.name, resolved_config(self.config, loaded.model, after)),
            prompt_tokens=len(ids),
            stored_tokens=stored,
            session=self._session.name if self._session else None,
            resumed_tokens=stored if self._session else 0,
            computed_tokens=len(ids) - stored,
            computed_again=self._choice.recompute,
            load_expected_s=self._choice.load_s,
            recompute_expected_s=self._choice.recompute_s,
            session_written_bytes=self._session.store.manifest.written_bytes if self._session else 0,
            sessions_written_bytes=self._session.written_bytes.total_bytes if self._session else 0,
            new_tokens=len(token_ids),
            finish_reason=generation.finish_reason,
            token_ids=token_ids,
            text=loaded.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            **cache,
            calibration_s=self._calibration_s,
            ttft_s=times_s[0] - started_s if times_s else 0.0,
            decode_tokens_per_s=tokens_per_s(times_s),
            itl_ms=latency_percentiles_ms(times_s),
            process_peak_rss_bytes=peak_rss_bytes(),
            notices=list(self._notices),
        )
