"""``Session``: a model together with one stored context.

A session is created once and opened again later. It appends to its context, generates from it, takes turns back and
forks. What ``append``, ``generate``, ``undo`` or ``fork`` has done is durable when the call returns. After a failure or
an interruption the session goes back to its last commit, in memory too. After ``close`` and ``open`` it continues with
the same tokens as if it had never been closed.

One writer a session, in this process or any other. One thread uses a session; generation runs in a second thread, which
ends before its iterator does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self

import torch

from kvswap.config import Config
from kvswap.core.attach import attach_each
from kvswap.core.cache import KVSwapCache
from kvswap.core.layer_major import Progress
from kvswap.core.load_or_recompute import Choice, load_or_recompute
from kvswap.core.prefill import chunk_spans
from kvswap.errors import InputError, on_error, undo_after
from kvswap.models import tokens
from kvswap.models.adapter import cache_keyword, check_length, check_token_ids, inspect
from kvswap.models.loading import LoadedModel, load_model
from kvswap.models.sampling import Sampling
from kvswap.models.streaming import Generation
from kvswap.sessions.binding import SessionBinding, compatible, identify
from kvswap.sessions.catalog import create_store, open_store, session_path
from kvswap.sessions.commits import SessionStore
from kvswap.sessions.quota import Limits, Quota, WrittenBytes, read_written_bytes
from kvswap.sessions.sharing import common_tokens, fork, share_prefix

COMMIT_PROMPT_TOKENS = 512
"""A prompt with so many new tokens is committed before the answer is generated."""

_STILL_GENERATING, _READ_ON = "text is still being generated", "read it to its end or close its iterator first"
_logger = logging.getLogger("kvswap")


class Session:
    """An open session, from ``create`` or ``open``. Close it, or use it in a ``with`` block.

    ``store`` is the session's folder, open for writing. The session closes it; if the constructor fails, the caller
    does. The other arguments are as for ``kvswap.load``.
    """

    def __init__(
        self,
        store: SessionStore,
        loaded: LoadedModel,
        config: Config,
        *,
        verify: bool = True,
        limits: Limits | None = None,
        on_progress: Progress | None = None,
        on_notice: Callable[[str], None] | None = None,
    ) -> None:
        self.store, self.config = store, config
        self._loaded, self._verify = loaded, verify
        self._on_progress, self._on_notice = on_progress, on_notice or _logger.warning
        self._quota = Quota(store.folder.path, limits or Limits(), self._on_notice)
        self._stack = ExitStack()
        self._cache: KVSwapCache | None = None
        self._generating = self._closed = False
        self._counted_bytes = 0  # of what this session's folder and cache have written
        self._broken = False  # a change runs or was broken off: only what is committed counts
        self._ids, self._conversation, self._tokens = list[int](), b"", 0
        self._identity = identify(loaded)
        self._read_committed()

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
        """A new session of a model, which is given by name or loaded; empty, or with ``prompt`` appended.

        Where a closed session stores the beginning of the prompt, it is shared instead of computed: see
        ``share_prefix``. With ``encrypt`` nothing but sizes and the manifest can be read without the key, which comes
        from the variable ``KVSWAP_SESSION_KEY`` or the system's keyring, now and whenever the session is opened.
        ``options`` are the other arguments of ``Session``. Raises SessionError where the name is taken, or without a
        key.
        """
        config = config or Config()
        session = cls._with_model(create_store(config.kv_dir, name, encrypt=encrypt), model, config, **options)
        if prompt is None:
            return session
        with on_error(session.close):
            ids = session.encode(prompt)
            session.share_prefix(ids)
            session.append(ids[len(session.token_ids) :])
        return session

    @classmethod
    def open(cls, name: str, model: str | LoadedModel, config: Config | None = None, **options: Any) -> Session:
        """An existing session, with the model it was created with. Raises SessionError, DamagedError, StorageError.

        The session fixes group_tokens, sinks, recent window, sketch and store_dtype. The other keys of ``config`` may
        differ from those it was created with. ``options`` are the other arguments of ``Session``.
        """
        config = config or Config()
        return cls._with_model(open_store(config.kv_dir, name), model, config, **options)

    @classmethod
    def _with_model(cls, store: SessionStore, model: str | LoadedModel, config: Config, **options: Any) -> Session:
        with on_error(store.close):
            loaded = load_model(model) if isinstance(model, str) else model
            return cls(store, loaded, config, **options)

    # ---- its contents

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.store.name

    @property
    def token_ids(self) -> list[int]:
        """Token ids of the whole context. K, V of the last one may be computed with the next step."""
        return list(self._ids)

    @property
    def tokens(self) -> int:
        """Tokens whose K, V are stored."""
        return self._cache.padded_tokens if self._cache is not None else self._tokens

    @property
    def conversation(self) -> bytes:
        """What was committed beside the token ids (JSON); empty where nothing was."""
        return self._conversation

    @property
    def written_bytes(self) -> WrittenBytes:
        """Bytes written for all sessions of this folder."""
        return read_written_bytes(self._quota.root)

    @property
    def cache(self) -> KVSwapCache:
        """The context as a cache for ``generate``, attached to the model at first use. ``commit`` makes it durable."""
        self._check_open()
        return self._open_cache()

    def _open_cache(self) -> KVSwapCache:
        if self._cache is None:
            binding = SessionBinding(self.store, self._identity, verify=self._verify, reserve=self._quota.reserve)
            tell: dict[str, Any] = {"on_progress": self._on_progress, "on_notice": self._on_notice}
            each = attach_each(
                self._loaded.model, [(None, self.config)], tokenizer=self._loaded.tokenizer, binding=binding, **tell
            )
            (cache,) = self._stack.enter_context(each)
            assert isinstance(cache, KVSwapCache)
            self._cache = cache
        return self._cache

    def encode(self, new: str | Sequence[int]) -> list[int]:
        """Token ids of text to append. In an empty session the tokenizer adds its special tokens.

        Raises InputError for ids that the model does not have.
        """
        if isinstance(new, str):
            new = tokens.encode(self._loaded.tokenizer, new, first=not self._ids, special=True)
        return check_token_ids(self._loaded.model, new)

    # ---- going on

    def append(self, new: str | Sequence[int], *, interim: bytes | None = None) -> int:
        """Append text or token ids to the context; returns how many tokens were computed.

        Attention is exact, also to what is stored already. The last token is not computed yet, because the first step
        of ``generate`` needs one. With ``interim``, a conversation (JSON), this is part of a prompt: the next commit
        replaces this one. Raises InputError for nothing to append, MemoryBudgetError, DiskError.
        """
        self._check_open()
        whole = [*self._ids, *self.encode(new)]
        if len(whole) == len(self._ids):
            raise InputError("nothing to append", hint="give some text")
        check_length(self._loaded.model, len(whole), self.store.label)
        stored = self.tokens
        if stored > len(self._ids):
            what = f"{self.store.label} has computed {stored - len(self._ids):,} tokens that are not committed"
            raise InputError(what, hint="call commit with their token ids, or rollback")
        compute = whole[stored : max(1, len(whole) - 1)]
        with self._changing():
            if compute:
                self._forward(compute)
            self._commit(whole, self._conversation if interim is None else interim, interim=interim is not None)
        return len(compute)

    def generate(self, **sampling: Any) -> Iterator[str]:
        """Stream text that continues the context, and append it. It is durable when the iterator has ended.

        ``sampling`` are the keys of ``Sampling``.
        """
        return self._generate(Sampling(**sampling))

    def fork(self, name: str) -> int:
        """Create a second session that begins as this one is now, over the same files; bytes of new disk."""
        self._check_open()
        return fork(self.store, session_path(self.config.kv_dir, name))

    def share_prefix(self, ids: Sequence[int], conversation: bytes = b"") -> str | None:
        """Let an empty session begin with the prefix of ``ids`` that a closed session of the same model stores.

        Returns the name of that session. Files are shared, its conversation and turns are not: ``conversation`` (JSON)
        takes their place. None where no session shares enough (see ``sharing``), or where this session is not empty.
        """
        self._check_open()
        if self.tokens or self.store.manifest.checkpoints:
            return None
        fits = partial(compatible, model=self._identity, config=self.config)
        ids = check_token_ids(self._loaded.model, ids)
        with self._changing():
            source = share_prefix(self.store, ids, fits, conversation)
            if source is not None:
                self._detach()
                self._read_committed()
        return source

    def load_or_recompute(self, tokens: int) -> Choice:
        """Whether to load what is stored of a prompt of ``tokens`` or to recompute it: the cheaper by measured rates.
        Until a prompt was computed and one appended, it is to load. To recompute, call ``cache.recompute`` and give the
        whole prompt to the next forward.
        """
        self._check_open()
        if any(part.order is None for part in inspect(self._loaded.model).layers):
            return Choice()
        new = tokens - self.tokens
        passes = sum(1 for _ in chunk_spans(new, self.config.chunk_tokens)) if new > 1 else 0
        choice = load_or_recompute(self.store.manifest.rates, self.tokens, passes)
        _logger.debug("%s: %d of %d prompt tokens are stored; %s", self.store.label, self.tokens, tokens, choice)
        return choice

    def commit(self, ids: Sequence[int], conversation: bytes = b"", *, interim: bool = False) -> None:
        """Make what ``cache`` contains now durable, with its token ids and the conversation (JSON).

        The next commit replaces an ``interim`` one, so that ``undo`` takes back both at once.
        """
        self._check_open()
        ids = check_token_ids(self._loaded.model, ids)
        if not self.tokens <= len(ids) <= self.tokens + 1:
            raise ValueError(f"{len(ids)} token ids for {self.tokens} tokens")
        with self._changing():
            self._commit(ids, conversation, interim=interim)

    def _commit(self, ids: list[int], conversation: bytes, *, interim: bool = False) -> None:
        unchanged = self.tokens == self._tokens
        if unchanged and not self.store.truncated and (ids, conversation) == (self._ids, self._conversation):
            return
        if unchanged and self._tokens:
            self.store.commit_text(ids, conversation, interim=interim)
        else:
            self._open_cache().commit(ids, conversation, interim=interim)
        self._record()
        self._ids, self._conversation, self._tokens = ids, conversation, self.tokens

    def commit_prompt(self, ids: Sequence[int], conversation: bytes = b"") -> None:
        """Have a long prompt ``ids`` committed as soon as it is computed, so that a kill does not cost it."""

        def commit() -> None:  # in the thread that generates
            with self._changing():
                self._commit(list(ids), conversation, interim=True)

        self.cache.after_prompt = commit if len(ids) - self.tokens >= COMMIT_PROMPT_TOKENS else None

    # ---- going back

    def undo(self) -> None:
        """Take back the last ``append`` or ``generate``. Raises SessionError when nothing can be taken back."""
        self._check_open()
        with self._changing():
            self._detach()
            self.store.undo()
            self._read_committed()

    def common_tokens(self, ids: Sequence[int]) -> int:
        """How many tokens the context and ``ids`` begin with in common; fewer than ``ids`` has."""
        return common_tokens(ids, self._ids)

    def truncate(self, tokens: int) -> int:
        """Keep the first ``tokens`` tokens of the context, up to the last whole group; returns how many are kept.

        ``truncate(0)`` begins a new context, as does a number below one group. So does any truncation for a model with
        sliding-window layers, which cannot go back into the middle of a context. Nothing changes on disk before the
        next commit. ``rollback`` and ``undo`` go back to what was there before, and so does ``close``.
        """
        self._check_open()
        if tokens >= self.tokens:
            self._ids = self._ids[:tokens]
            return self.tokens
        with self._changing():
            self._detach()
            self.store.truncate(tokens)
            self._read_committed()
        return self._tokens

    def rollback(self) -> None:
        """Go back to the last commit, as after a forward that failed."""
        self._broken = True
        self._detach()
        self.store.rollback()
        self._read_committed()
        self._broken = False

    def close(self, *, discard_empty: bool = False) -> None:
        """Give back the model, the memory and the writer's lock. May be called twice.

        With ``discard_empty`` a session that nothing was ever committed to is removed.
        """
        if self._generating:
            raise InputError(_STILL_GENERATING, hint=_READ_ON)
        self._closed = True
        try:
            self._detach()
        finally:
            self.store.close(discard_empty=discard_empty)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        undo_after(error, self.close) if error is not None else self.close()

    # ---- details

    def _generate(self, sampling: Sampling) -> Iterator[str]:
        self._check_open()
        if len(self._ids) <= self.tokens:
            raise InputError("the context has no token to continue from", hint="append some text first")
        loaded = self._loaded
        check_length(loaded.model, len(self._ids) + sampling.max_new_tokens - 1, self.store.label)
        generation = Generation(loaded.model, loaded.tokenizer, self._ids, self.cache, sampling, None, self._on_notice)
        self._generating = self._broken = True
        try:
            yield from generation
        finally:
            self._generating = False
            if generation.error is not None:
                undo_after(generation.error, self.rollback)
            else:
                with self._changing():
                    self._commit(self._ids + generation.token_ids, self._conversation)

    def _forward(self, ids: list[int]) -> None:
        model, cache = self._loaded.model, self._open_cache()
        tokens = torch.tensor([ids], device=model.device)
        with torch.no_grad(), cache.prompt():  # a single token as well, which would be a decode step
            model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{cache_keyword(model): cache})

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Around a change: where it breaks off, the session goes back to its last commit, now or when next used."""
        self._broken = True
        with on_error(self.rollback):
            yield
        self._broken = False

    def _read_committed(self) -> None:
        """Take over token ids and conversation of the store."""
        contents = self.store.load(tail_only=True)
        self._ids = contents.ids if contents else []
        self._conversation = contents.conversation if contents else b""
        self._tokens = contents.tokens if contents else 0

    def _detach(self) -> None:
        """Give the model back. The next use of ``cache`` attaches to it again, as of the last commit."""
        cache, self._cache = self._cache, None
        try:
            self._stack.close()
        finally:
            self._record(cache)
            self._counted_bytes = self.store.folder.written_bytes

    def _record(self, cache: KVSwapCache | None = None) -> None:
        """Count what was written since the last call as written, whether it was committed or not."""
        cache = cache if cache is not None else self._cache
        data_bytes = cache.stats.disk_write_bytes if cache is not None else 0
        total_bytes = self.store.folder.written_bytes + data_bytes
        self._quota.record(total_bytes - self._counted_bytes)
        self._counted_bytes = total_bytes

    def _check_open(self) -> None:
        if self._closed:
            raise InputError(f"{self.store.label} is closed", hint="open it again")
        if self._generating:
            raise InputError(_STILL_GENERATING, hint=_READ_ON)
        if self._broken:
            self.rollback()
