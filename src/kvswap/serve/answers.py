"""Answers questions with the model: finds the conversation that a prompt goes on from, and opens an engine on it.

``Answers`` belongs to one thread, the worker's. One engine is open at a time, and stays open after an answer, because
the next request is most likely the next turn. A prompt goes on in place where it continues a conversation of this
server. Where it differs from one, it goes on in a fork, which shares the files: the first stays as it was.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass

from kvswap.app.engine import Engine
from kvswap.app.scoring import score_prompt
from kvswap.config import Config
from kvswap.errors import KVSwapError, SessionError, undo_after
from kvswap.models.adapter import inspect
from kvswap.models.loading import LoadedModel
from kvswap.models.logprobs import Logprobs
from kvswap.serve.jobs import Done, Echo, Job, Piece, Progress
from kvswap.serve.library import PREFIX, Library, Stored, new_name
from kvswap.sessions.binding import identify
from kvswap.sessions.catalog import create_store, open_store, remove, session_path, sessions_dir
from kvswap.sessions.commits import SessionStore
from kvswap.sessions.quota import Limits
from kvswap.sessions.sharing import fork

PIECE_TOKENS = 4096
"""A long prompt is committed after each so many tokens: what a client that goes away loses at most."""
PROGRESS_S = 0.25
_logger = logging.getLogger("kvswap.serve")
ANSWER_SLACK_TOKENS = 64
"""A template may write the beginning of an answer in another way once the answer is there."""


class Left(Exception):  # noqa: N818 - not an error
    """Raised within a prompt to leave it, because nobody waits for the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How conversations are stored: see ``kvswap serve --help``."""

    config: Config
    limits: Limits
    encrypt: bool = False
    verify: bool = True


class Answers:
    """Answers one job at a time. ``close`` gives back the model and closes the session."""

    def __init__(self, loaded: LoadedModel, settings: Settings) -> None:
        self._loaded, self._settings = loaded, settings
        self._library = Library()
        self._library_read = False
        self._engine: Engine | None = None
        self._name: str | None = None  # of the session that the engine is on
        self._fresh_fork: str | None = None  # made for the running job, and so far a copy of another conversation
        self._job: Job | None = None
        self._told_s = 0.0
        self._cuts = all(part.order is not None for part in inspect(loaded.model).layers)

    def answer(self, job: Job) -> None:
        """Answer a job: its events say what happens, and the exception why it failed. Returns early where it is left.

        Raises KVSwapError.
        """
        if job.cancelled:
            return
        self._job = job
        try:
            if job.question.echo and job.question.top_logprobs is not None:
                self._echo(job)
            if job.question.sampling["max_new_tokens"]:
                self._answer(job)
            else:
                job.tell(Done(None))
        except Left:
            pass
        except BaseException as error:  # whatever state the engine is in, the next job gets a new one
            undo_after(error, self.close)
            raise
        finally:
            self._job = None
            self._drop_fresh_fork()

    def close(self) -> None:
        """Close the engine. May be called at any time between jobs, and twice."""
        engine, self._engine, self._name = self._engine, None, None
        if engine is not None:
            engine.close()

    def _echo(self, job: Job) -> None:
        self.close()  # the model takes one attachment at a time
        config, top = self._settings.config, job.question.top_logprobs or 0
        job.tell(Echo(score_prompt(self._loaded, config, job.question.ids, top, on_progress=self._report)))

    def _answer(self, job: Job) -> None:
        question = job.question
        engine = self._open(job) if question.store else self._open_without_session()
        logprobs = None if question.top_logprobs is None else Logprobs(question.top_logprobs)
        self._told_s, given = 0.0, 0
        if question.messages:
            pieces = engine.chat(question.messages, tools=question.tools, logprobs=logprobs, **question.sampling)
        else:
            pieces = engine.complete(question.text, logprobs=logprobs, **question.sampling)
        try:
            with contextlib.closing(pieces) as running:
                for text in running:
                    found = logprobs.tokens[given:] if logprobs is not None else []
                    given += len(found)
                    job.tell(Piece(text, found))
                    if job.cancelled:
                        return
        finally:
            self._remember(engine)
        if logprobs is not None and logprobs.tokens[given:]:
            job.tell(Piece("", logprobs.tokens[given:]))
        job.tell(Done(engine.stats))

    def _remember(self, engine: Engine) -> None:
        """Keep the index as the session is now, also after an answer that was left."""
        session = engine.session
        if session is None or not session.tokens:
            return
        if session.name == self._fresh_fork and self._library.has(session.name, session.token_ids):
            return
        self._fresh_fork = None
        self._library.put(session.name, session.token_ids, session.tokens, engine.messages)

    def _drop_fresh_fork(self) -> None:
        """Remove a fork that was left before anything was added to it: it is only a copy of its source."""
        name, self._fresh_fork = self._fresh_fork, None
        if name is not None:
            with contextlib.suppress(KVSwapError):
                self.remove(name)

    def _report(self, stage: str, done: int, total: int) -> None:
        """Called by the engine, in whichever thread runs the model."""
        job, now_s = self._job, time.monotonic()
        if job is None:
            return
        if job.cancelled:
            raise Left
        if stage == "prefill" and (now_s - self._told_s > PROGRESS_S or done == total):
            self._told_s = now_s
            stats = self._engine.stats if self._engine is not None else None
            tokens = stats.prompt_tokens if stats is not None and stats.prompt_tokens else len(job.question.ids)
            stored = stats.stored_tokens if stats is not None else 0
            job.tell(Progress(stored + (tokens - stored) * done // max(1, total), tokens))

    # ---- stored conversations

    def remove(self, name: str) -> None:
        """Remove a conversation of the server from the disk. Raises SessionError."""
        if not name.startswith(PREFIX):
            raise SessionError(f"{name} is not a conversation of this server", hint="use kvswap sessions rm")
        if self._name == name:
            self.close()
        remove(session_path(self._settings.config.kv_dir, name))
        self._library.drop(name)

    def fork(self, name: str) -> str:
        """A second conversation that begins as this one is; its name. Raises SessionError, DiskError."""
        new, kv_dir = new_name(), self._settings.config.kv_dir
        if self._name == name:
            self.close()
        with open_store(kv_dir, name) as source:
            fork(source, session_path(kv_dir, new))
        self._library.read_one(session_path(kv_dir, new))
        return new

    # ---- which conversation a prompt goes on from

    def _open(self, job: Job) -> Engine:
        """An engine on the session that the question goes on from: in place, on a fork, or a new one."""
        self._read_library()
        question = job.question
        stored = self._library.continued_by(question.messages)
        if stored is not None and (engine := self._try(stored.name)) is not None:
            shared, answered = engine.shared_tokens(question.messages, question.tools)
            if shared >= answered - ANSWER_SLACK_TOKENS:
                return engine
        stored, common = self._library.longest_prefix(question.ids)
        if stored is not None and self._is_whole(stored, common):
            if (engine := self._try(stored.name)) is not None:
                return engine
        elif stored is not None and self._cuts and (engine := self._try_fork(stored)) is not None:
            return engine
        config, encrypt = self._settings.config, self._settings.encrypt
        return self._on(create_store(config.kv_dir, new_name(), encrypt=encrypt))

    def _is_whole(self, stored: Stored, common: int) -> bool:
        return stored.own and common == stored.tokens

    def _try(self, name: str) -> Engine | None:
        """An engine on an existing session; None where it cannot be opened, which is then forgotten."""
        if self._engine is not None and self._name == name:
            return self._engine
        self.close()
        try:
            return self._on(open_store(self._settings.config.kv_dir, name))
        except KVSwapError:  # removed, damaged, or in use by another program
            self._library.drop(name)
            return None

    def _try_fork(self, stored: Stored) -> Engine | None:
        """An engine on a fork of a session, which shares its files; None where it cannot be opened."""
        try:
            self._fresh_fork = self.fork(stored.name)
            return self._try(self._fresh_fork)
        except KVSwapError:
            self._library.drop(stored.name)
            return None

    def _on(self, store: SessionStore) -> Engine:
        settings, closing = self._settings, self._engine
        if closing is not None:
            try:
                self.close()
            except BaseException:
                store.close(discard_empty=True)
                raise
        self._engine = Engine(
            self._loaded,
            settings.config,
            session=store,
            verify=settings.verify,
            limits=settings.limits,
            share=False,
            piece_tokens=PIECE_TOKENS,
            on_progress=self._report,
            on_notice=_logger.info,
        )
        self._name = store.name
        return self._engine

    def _open_without_session(self) -> Engine:
        self.close()
        self._engine = Engine(self._loaded, self._settings.config, on_progress=self._report, on_notice=_logger.info)
        return self._engine

    def _read_library(self) -> None:
        if not self._library_read:
            config = self._settings.config
            self._library.read(sessions_dir(config.kv_dir), identify(self._loaded), config)
            self._library_read = True
