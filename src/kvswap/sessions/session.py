"""One stored context of one model: create it, append to it, generate from it, fork it, take turns back, go on tomorrow.

Whatever ``append``, ``generate``, ``undo`` or ``fork`` has done is durable when it returns; an interruption before that
leaves the session as it was. What comes back after ``close`` and ``open`` goes on with the same tokens as if it had
never been closed. One writer a session, in this process or any other. One thread (generation runs in a second one,
which ends before its iterator does).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from kvswap.config import Config
from kvswap.core.attach import attach_each
from kvswap.core.cache import KVSwapCache
from kvswap.core.layer_major import Progress
from kvswap.core.prefill import chunk_spans
from kvswap.core.rates import Choice, choose
from kvswap.errors import InputError
from kvswap.models.adapter import cache_keyword, context_limit, inspect
from kvswap.models.identity import rope_hash, tokenizer_hash, weights_hash
from kvswap.models.loading import LoadedModel, load_model
from kvswap.models.sampling import Sampling
from kvswap.models.streaming import Generation
from kvswap.sessions.binding import SessionBinding, made_alike
from kvswap.sessions.folder import SessionFolder
from kvswap.sessions.fork import fork
from kvswap.sessions.manifest import Model
from kvswap.sessions.prefix import borrow
from kvswap.sessions.quota import Limits, Room, Usage, add_usage, read_usage
from kvswap.sessions.shelf import create_session, open_session, session_path

KEEP_TOKENS = 512
"""A prompt with so many new tokens is worth a commit of its own."""


class Session:
    """An open session. Made by ``create`` or ``open``; close it, or use it in a ``with`` block.

    Parameters
    ----------
    folder
        The session's folder, open for writing; it is closed with the session.
    loaded
        Model and tokenizer, as ``load_model`` gives them.
    verify
        Whether groups are compared with their checksums when they are read.
    limits
        How much disk all sessions together may take, and how much may be written a day.
    on_progress, on_notice
        As for ``kvswap.load``.
    """

    def __init__(
        self,
        folder: SessionFolder,
        loaded: LoadedModel,
        config: Config,
        *,
        verify: bool = True,
        limits: Limits | None = None,
        on_progress: Progress | None = None,
        on_notice: Callable[[str], None] | None = None,
    ) -> None:
        self.folder, self.config = folder, config
        self._loaded, self._verify = loaded, verify
        self._on_progress = on_progress
        self._on_notice = on_notice or logging.getLogger("kvswap").warning
        self._room = Room(folder.folder.path, limits or Limits(), self._on_notice)
        self._stack = ExitStack()
        self._cache: KVSwapCache | None = None
        self._generating = self._closed = self._restarted = False
        self._ids = list[int]()
        self._talk, self._tokens = b"", 0
        try:
            self._identity = self._identify()
            self._reload()
        except BaseException:
            folder.close()
            raise

    @classmethod
    def create(
        cls,
        name: str,
        model: str | LoadedModel,
        config: Config | None = None,
        *,
        prompt: str | Sequence[int] | None = None,
        encrypt: bool = False,
        **options: Any,
    ) -> Session:
        """A new session of a model, given by name or loaded; empty, or with ``prompt`` appended.

        What a closed session holds of the prompt's beginning is shared instead of being computed: see ``borrow``.
        With ``encrypt`` nothing but sizes and the manifest can be read without the key, which comes from the variable
        ``KVSWAP_SESSION_KEY`` or the system's keyring, now and whenever the session is opened.
        Raises SessionError when the name is taken, or without a key.
        """
        config = config or Config()
        session = cls._with_model(create_session(config.kv_dir, name, encrypt=encrypt), model, config, **options)
        if prompt is None:
            return session
        try:
            ids = session.encode(prompt)
            session.borrow(ids)
            session.append(ids[len(session.token_ids) :])
        except BaseException:
            session.close()
            raise
        return session

    @classmethod
    def open(cls, name: str, model: str | LoadedModel, config: Config | None = None, **options: Any) -> Session:
        """An existing session, with the model it was made with. Raises SessionError, DamagedError, StorageError.

        What is fixed for a session (group_tokens, sinks, recent window, sketch, store_dtype) comes from it; other keys
        of ``config`` may be as they like.
        """
        config = config or Config()
        return cls._with_model(open_session(config.kv_dir, name), model, config, **options)

    @classmethod
    def _with_model(cls, folder: SessionFolder, model: str | LoadedModel, config: Config, **options: Any) -> Session:
        try:
            loaded = load_model(model) if isinstance(model, str) else model
        except BaseException:
            folder.close()
            raise
        return cls(folder, loaded, config, **options)

    # ---- what it holds

    @property
    def name(self) -> str:
        """Its name."""
        return self.folder.name

    @property
    def token_ids(self) -> list[int]:
        """Token ids of the whole context; the last one's K, V may come with the next step."""
        return list(self._ids)

    @property
    def tokens(self) -> int:
        """Tokens whose K, V are stored."""
        return self._cache.padded_tokens if self._cache is not None else self._tokens

    @property
    def usage(self) -> Usage:
        """What was written for all sessions of this folder."""
        return read_usage(self._room.root)

    @property
    def conversation(self) -> bytes:
        """What ``commit`` was given beside the ids; empty where nothing was."""
        return self._talk

    @property
    def cache(self) -> KVSwapCache:
        """The context as a cache for ``generate``, attached to the model at first use. ``commit`` makes it durable."""
        self._check_open()
        if self._cache is None:
            binding = SessionBinding(self.folder, self._identity, verify=self._verify, reserve=self._room.ask)
            (cache,) = self._stack.enter_context(
                attach_each(
                    self._loaded.model,
                    [(None, self.config)],
                    tokenizer=self._loaded.tokenizer,
                    on_progress=self._on_progress,
                    on_notice=self._on_notice,
                    binding=binding,
                )
            )
            assert isinstance(cache, KVSwapCache)
            self._cache = cache
        return self._cache

    # ---- what it does

    def append(self, new: str | Sequence[int]) -> int:
        """Take text or token ids into the context; how many tokens were computed.

        Attention is exact, also to what is stored already. The last token is computed with what comes next, as the
        first step of ``generate`` needs one. Raises InputError for nothing, MemoryBudgetError, DiskError.
        """
        self._check_open()
        whole = [*self._ids, *self.encode(new)]
        if len(whole) == len(self._ids):
            raise InputError("nothing to append", hint="give some text")
        self._check_length(len(whole))
        stored = self.tokens
        compute = whole[stored : max(1, len(whole) - 1)]
        if compute:
            self._forward(compute)
        self.commit(whole, self._talk)
        return len(compute)

    def encode(self, new: str | Sequence[int]) -> list[int]:
        """Token ids of what comes next; text in an empty session gets the tokenizer's special tokens."""
        if not isinstance(new, str):
            return [int(each) for each in new]
        ids: list[int] = self._loaded.tokenizer(new, add_special_tokens=not self._ids, verbose=False)["input_ids"]
        return ids

    def generate(
        self, *, max_new_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None
    ) -> Iterator[str]:
        """Stream text that goes on from the context, and take it in; durable when the iterator has ended."""
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        return self._generate(sampling)

    def undo(self) -> None:
        """Take back the last ``append`` or ``generate``. Raises SessionError when nothing can be taken back."""
        self._check_open()
        self.detach()
        try:
            self.folder.undo()
        finally:
            self._reload()

    def fork(self, name: str) -> int:
        """Make another session that begins as this one is now, sharing its files; bytes of new disk it took."""
        self._check_open()
        return fork(self.folder, session_path(self.config.kv_dir, name))

    def align(self, ids: Sequence[int]) -> int:
        """Keep the part of the context that ``ids`` begin with, up to the last whole group; how many tokens that is.

        At least the last of ``ids`` stays to be computed. What is taken out can be gone back to with ``undo``. Models
        with sliding-window layers cannot go back into the middle of a context: all of it stays, or nothing.
        """
        self._check_open()
        limit = min(len(ids) - 1, len(self._ids))
        differ = np.flatnonzero(np.array(ids[:limit]) != np.array(self._ids[:limit]))
        shared = int(differ[0]) if len(differ) else limit
        if shared >= self.tokens:
            self._ids = self._ids[: self.tokens]
            return self.tokens
        self.detach()
        layout = self.folder.manifest.layout
        groups = shared // layout.group_tokens if layout else 0
        sliding = any(part.order is None for part in inspect(self._loaded.model).layers)
        if groups and not sliding:
            self.folder.cut(groups)
        else:
            self.folder.restart()
        self._reload()
        return self._tokens

    def borrow(self, ids: Sequence[int]) -> str | None:
        """Begin an empty session with what a closed session of the same model holds of ``ids``; that one's name.

        As ``align``, token by token up to the last whole group; the files are shared, conversation and turns are not.
        None where nothing worth it is held, or this session is not empty.
        """
        self._check_open()
        if self.tokens or self.folder.manifest.checkpoints:
            return None
        fits = partial(made_alike, model=self._identity, config=self.config)
        name, written_bytes = borrow(self.folder, ids, fits)
        if not name:
            return None
        self.detach()
        add_usage(self._room.root, written_bytes)
        self._reload()
        return name

    def weigh(self, tokens: int) -> Choice:
        """Whether to read what the session holds of a prompt of ``tokens``, or to compute it again: the cheaper.

        By rates that the session has measured; unknown until a prompt was computed and one appended. After
        ``cache.recompute`` the next forward takes the whole prompt.
        """
        self._check_open()
        if any(part.order is None for part in inspect(self._loaded.model).layers):
            return Choice()
        passes = sum(1 for _ in chunk_spans(tokens - self.tokens, self.config.chunk_tokens))
        return choose(self.folder.manifest.rates, self.tokens, passes if tokens - self.tokens > 1 else 0)

    def commit(self, ids: Sequence[int], talk: bytes = b"", *, interim: bool = False) -> None:
        """Make what ``cache`` holds now durable, with its token ids and the conversation (JSON).

        The next commit takes the place of an ``interim`` one, as ``undo`` sees it.
        """
        self._check_open()
        ids = list(ids)
        unchanged = self.tokens == self._tokens
        if unchanged and ids == self._ids and talk == self._talk and not self._restarted:
            return
        before_bytes = self.folder.manifest.written_bytes
        self.cache.commit(ids, talk, interim=interim)
        add_usage(self._room.root, self.folder.manifest.written_bytes - before_bytes)
        self._ids, self._talk, self._tokens, self._restarted = ids, talk, self.tokens, False

    def keep_prompt(self, ids: Sequence[int], talk: bytes = b"") -> None:
        """Have the prompt ``ids`` made durable as soon as it is through: a kill while answering must not cost it."""
        worth = len(ids) - self.tokens >= KEEP_TOKENS
        self.cache.after_prompt = partial(self.commit, list(ids), talk, interim=True) if worth else None

    def give_up(self) -> None:
        """Go back to the last commit, as after a forward that broke off."""
        self.detach()
        self.folder.give_up()
        self._reload()

    def close(self) -> None:
        """Give back the model, the memory and the writer's lock. May be called twice."""
        if self._generating:
            raise InputError("text is still being generated", hint="read it to its end or close its iterator first")
        self._closed = True
        try:
            self.detach()
        finally:
            self.folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- details

    def _generate(self, sampling: Sampling) -> Iterator[str]:
        self._check_open()
        if len(self._ids) <= self.tokens:
            raise InputError("the context has no token to go on from", hint="append some text first")
        self._check_length(len(self._ids) + sampling.max_new_tokens - 1)
        loaded = self._loaded
        generation = Generation(loaded.model, loaded.tokenizer, self._ids, self.cache, sampling)
        self._generating = True
        try:
            yield from generation
        finally:
            self._generating = False
            if generation.error is not None:
                self.give_up()
            else:
                self.commit(self._ids + generation.token_ids, self._talk)

    @torch.no_grad()
    def _forward(self, ids: list[int]) -> None:
        model = self._loaded.model
        tokens = torch.tensor([ids], device=model.device)
        try:
            model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{cache_keyword(model): self.cache})
        except BaseException:
            self.give_up()
            raise

    def _reload(self) -> None:
        """What the last commit says."""
        stored = self.folder.load(tail_only=True)
        self._ids = stored.ids if stored else []
        self._talk = stored.conversation if stored else b""
        self._tokens = stored.tokens if stored else 0
        self._restarted = stored is None and bool(self.folder.manifest.checkpoints)

    def detach(self) -> None:
        """Give the model back; the next use attaches to it again, as of the last commit."""
        self._cache = None
        self._stack.close()

    def _identify(self) -> Model:
        parts = inspect(self._loaded.model)
        return Model(
            name=self._loaded.name[:1024],
            fingerprint=weights_hash(parts),
            tokenizer=tokenizer_hash(self._loaded.tokenizer),
            rope=rope_hash(parts),
            dtype=str(parts.dtype).removeprefix("torch."),
        )

    def _check_length(self, tokens: int) -> None:
        limit = context_limit(self._loaded.model)
        if limit is not None and tokens > limit:
            raise InputError(
                f"{self.folder.what} would have {tokens:,} tokens, the model's limit is {limit:,}",
                hint="append less, or generate less",
            )

    def _check_open(self) -> None:
        if self._closed:
            raise InputError(f"{self.folder.what} is closed", hint="open it again")
        if self._generating:
            raise InputError("text is still being generated", hint="read it to its end or close its iterator first")
