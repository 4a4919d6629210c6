"""Text in, text out: a model, its cache and one conversation.

``load`` gives an ``Engine``; ``ask`` streams an answer and remembers the turn, so that the next ``ask`` computes only
what is new. One answer at a time; an engine belongs to one thread (generation runs in a second one, joined before
``ask`` ends). With a session, prompt and answer are durable when they are complete; without one, closing the engine
drops the cache. Either way the model is given back as it was.
"""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvswap.app.documents import Document, read_document
from kvswap.app.prompt import Conversation, Request, make_request
from kvswap.app.quality import QualityMeter
from kvswap.app.stats import RunStats, latency_percentiles_ms, tokens_per_s
from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.core.cache import KVSwapCache
from kvswap.core.layer_major import FullCache, InMemory, Progress
from kvswap.core.rates import Choice
from kvswap.core.trace import CacheStats
from kvswap.disk.folders import kv_folder
from kvswap.errors import InputError, SessionError, UnsupportedError
from kvswap.memory.available import peak_rss_bytes
from kvswap.models.adapter import context_limit
from kvswap.models.loading import LoadedModel, load_model
from kvswap.models.sampling import Sampling
from kvswap.models.streaming import Generation, end_tokens
from kvswap.selection.kvswap import method as own_method
from kvswap.selection.method import Method
from kvswap.sessions.folder import SessionFolder
from kvswap.sessions.quota import Limits
from kvswap.sessions.session import Session
from kvswap.sessions.shelf import close_session, open_or_create


def load(
    model: str | LoadedModel,
    config: Config | None = None,
    *,
    method: Method | InMemory | None = None,
    dtype: str = "auto",
    mmap: bool = True,
    session: str | SessionFolder | None = None,
    verify: bool = True,
    limits: Limits | None = None,
    on_progress: Progress | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> Engine:
    """Load a model and put its cache on disk.

    Parameters
    ----------
    model
        Local directory, ``.gguf`` file, hub id or ``smollm2-135m``; or what ``load_model`` gave.
    method
        A method to compare with, as ``kvswap.lab.rivals.find`` gives it; None is kvswap's own.
    dtype, mmap
        As for ``load_model``.
    session
        Name of a session below ``config.kv_dir``, which is made or goes on from where it was; or one that is open.
    verify
        Whether what is read of a session is compared with its checksums.
    limits
        How much disk sessions may take, and how much may be written a day.
    on_progress
        Called with ``("calibrate" | "prefill", done, total)``.
    on_notice
        Called with a sentence where something falls back; by default it is logged as a warning.

    Raises
    ------
    ModelError, ConfigError, StorageError
    """
    notice = on_notice or logging.getLogger("kvswap").warning
    loaded = load_model(model, dtype=dtype, mmap=mmap, on_notice=notice) if isinstance(model, str) else model
    config = config or Config()
    if isinstance(session, str):
        session = open_or_create(config.kv_dir, session)
    options: dict[str, Any] = {"session": session, "verify": verify, "limits": limits}
    return Engine(loaded, config, method=method, on_progress=on_progress, on_notice=notice, **options)


class Engine:
    """One conversation with one model. Close it, or use it in a ``with`` block.

    With ``check_quality`` set, some steps are done over again exactly; ``stats.quality`` has what that shows.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: Config,
        *,
        method: Method | InMemory | None = None,
        session: SessionFolder | None = None,
        verify: bool = True,
        limits: Limits | None = None,
        on_progress: Progress | None = None,
        on_notice: Callable[[str], None] | None = None,
    ) -> None:
        self.config, self.method, self.check_quality = config, method or own_method(), False
        self._loaded, self._on_progress, self._on_notice = loaded, on_progress, on_notice
        self._notices: list[str] = []
        self._stack = ExitStack()
        self._cache: KVSwapCache | FullCache | None = None
        self._generation: Generation | None = None
        self._setup_s = self._calibration_s = 0.0
        self._closed, self._choice = False, Choice()
        self._said = Conversation()
        self._session: Session | None = None
        self._stats = self._blank()
        try:
            if session is not None:
                self._stack.callback(close_session, session)
                self._join(session, verify, limits)
            self._open()
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

    def begin_anew(self) -> None:
        """Begin another conversation. In a session, the part of the next prompt that is stored already is kept."""
        self._said = Conversation()
        if self._session is None:
            self._drop()

    @property
    def session(self) -> Session | None:
        """The session that the conversation is kept in."""
        return self._session

    def undo(self) -> None:
        """Take back the last turn of a session. Raises SessionError when there is none."""
        if self._session is None:
            raise SessionError("there is no session to take back a turn of", hint="load with session=NAME")
        self._cache = None
        self._session.undo()
        self._recall()

    def close(self) -> None:
        """Drop the cache and give the model back as it was. The engine is of no use afterwards."""
        if self._generation is not None:
            raise InputError("an answer is still being read", hint="read it to its end or close its iterator first")
        self._closed = True
        self._cache = None
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- one question

    def _ask(self, question: str, documents: Sequence[str | Path | Document], sampling: Sampling) -> Iterator[str]:
        if self._closed:
            raise InputError("the engine is closed", hint="load the model again")
        if self._generation is not None:
            raise InputError("an answer is still being read", hint="read it to its end or close its iterator first")
        started_s = time.perf_counter()
        texts = [item if isinstance(item, Document) else read_document(item) for item in documents]
        request = make_request(question, texts)
        text, ids, goes_on = self._said.prompt(self._loaded.tokenizer, request)
        sampling = self._fit(len(ids), sampling)
        self._settle(ids, goes_on)
        cache = self._cache or self._open()
        started_s -= self._setup_s - self._calibration_s
        before, stored = cache.stats, cache.get_seq_length()
        if self._session is not None:
            self._session.keep_prompt(ids, self._said.pack())
        checked = self.check_quality and isinstance(cache, KVSwapCache)
        meter = QualityMeter(self._loaded.model, cache) if checked else None
        generation = Generation(self._loaded.model, self._loaded.tokenizer, ids, cache, sampling, meter)
        self._generation = generation
        try:
            yield from generation
        finally:
            self._generation = None
            if generation.error is not None:
                self._drop()  # a forward broke off: layers hold different numbers of tokens
            else:
                self._remember(request, text, ids, generation.token_ids)
                stats = self._measure(generation, sampling, ids, stored, started_s, before, cache.stats)
                self._stats = replace(stats, quality=meter.stats if meter else None)
                self._setup_s = self._calibration_s = 0.0

    def _settle(self, ids: list[int], goes_on: bool) -> None:
        """See that what is stored is the beginning of the prompt."""
        if self._session is not None:
            lender = self._session.borrow(ids)
            before, kept = self._session.tokens, self._session.align(ids)
            self._cache = self._session.cache
            self._choice = self._session.weigh(len(ids))
            if self._choice.again:
                self._session.cache.recompute()
            if lender is not None:
                self._notice(f"{self._session.folder.what} begins with {kept:,} tokens that session {lender} holds")
            if kept < before:
                what = self._session.folder.what
                self._notice(f"{what}: this prompt begins as the first {kept:,} of its {before:,} tokens do")
        elif not goes_on and self._cache is not None and self._cache.get_seq_length():
            self._notice("the chat template words the conversation anew, so all of it is computed again")
            self._drop()

    def _fit(self, tokens: int, sampling: Sampling) -> Sampling:
        """Keep the answer within the model's context; raises InputError when the prompt is past it."""
        limit = context_limit(self._loaded.model)
        if limit is None:
            return sampling
        if tokens > limit:
            raise InputError(
                f"the context has {tokens:,} tokens, {tokens - limit:,} more than the model's limit of {limit:,}",
                hint="give fewer or shorter documents, or a model with a longer context",
            )
        room = limit - tokens + 1  # the last token is never computed with
        if room < sampling.max_new_tokens:
            self._notice(f"the model's limit of {limit:,} tokens leaves room for an answer of {room:,} tokens")
        return replace(sampling, max_new_tokens=min(room, sampling.max_new_tokens))

    def _remember(self, request: Request, text: str, ids: list[int], answer_ids: list[int]) -> None:
        self._said.remember(self._loaded.tokenizer, request, text, ids, answer_ids)
        if self._session is not None:
            self._session.commit(self._said.ids, self._said.pack())

    # ---- the session

    def _join(self, folder: SessionFolder, verify: bool, limits: Limits | None) -> None:
        if self.method.name != own_method().name:
            raise UnsupportedError(f"a session with method {self.method.name}", hint="only kvswap keeps sessions")
        tell: dict[str, Any] = {"on_progress": self._report, "on_notice": self._notice}
        self._session = Session(folder, self._loaded, self.config, verify=verify, limits=limits, **tell)
        self._stack.callback(self._session.detach)
        self._recall()

    def _recall(self) -> None:
        """The conversation as the session has it."""
        assert self._session is not None
        session = self._session
        self._said = Conversation.unpack(session.conversation, session.token_ids, session.folder.what)

    # ---- the cache

    def _open(self) -> KVSwapCache | FullCache:
        started_s = time.perf_counter()
        loaded = self._loaded
        if self._session is not None:
            self._cache = self._session.cache
            self._setup_s = time.perf_counter() - started_s
            self._calibration_s = self._cache.trace.calibration_s
            return self._cache
        self._cache = self._stack.enter_context(
            attach(
                loaded.model,
                self.config,
                tokenizer=loaded.tokenizer,
                method=self.method,
                on_progress=self._report,
                on_notice=self._notice,
            )
        )
        self._setup_s = time.perf_counter() - started_s
        self._calibration_s = self._cache.trace.calibration_s
        return self._cache

    def _drop(self) -> None:
        self._cache = None
        if self._session is not None:
            self._session.give_up()
            self._recall()
        else:
            self._said = Conversation(self._said.turns)
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

    def _blank(self) -> RunStats:
        return RunStats(
            model=self._loaded.name,
            method=self.method.name,
            config=self._resolved(None),
            kvswap_version=importlib.metadata.version("kvswap"),
            torch_version=importlib.metadata.version("torch"),
            transformers_version=importlib.metadata.version("transformers"),
        )

    def _resolved(self, stats: CacheStats | None) -> dict[str, Any]:
        """The configuration with what ``auto`` and None became."""
        model, values = self._loaded.model, self.config.to_dict()
        values["kv_dir"] = values["kv_dir"] or str(kv_folder(None))
        values |= {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
        if stats is not None:
            values |= {"sketch": stats.sketch, "resolved_backend": stats.backend}
        return values

    def _measure(
        self,
        generation: Generation,
        sampling: Sampling,
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
            self._blank(),
            config=self._resolved(after),
            prompt_tokens=len(ids),
            stored_tokens=stored,
            session=self._session.name if self._session else None,
            resumed_tokens=stored if self._session else 0,
            computed_tokens=len(ids) - stored,
            computed_again=self._choice.again,
            load_expected_s=self._choice.load_s,
            recompute_expected_s=self._choice.recompute_s,
            session_written_bytes=self._session.folder.manifest.written_bytes if self._session else 0,
            sessions_written_bytes=self._session.usage.total_bytes if self._session else 0,
            new_tokens=len(token_ids),
            finish_reason=self._finish_reason(token_ids, sampling),
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

    def _finish_reason(self, token_ids: list[int], sampling: Sampling) -> str:
        if token_ids and token_ids[-1] in (end_tokens(self._loaded.model, self._loaded.tokenizer) or ()):
            return "stop"
        return "length" if len(token_ids) >= sampling.max_new_tokens else "interrupted"
