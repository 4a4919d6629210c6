"""What an engine's model attends to: a cache in files without a name, or that of a session.

``Context.match`` sees that what is stored is the beginning of a prompt, and takes back the rest. One thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.core.cache import KVSwapCache
from kvswap.core.layer_major import FullCache, InMemory, Progress
from kvswap.core.load_or_recompute import Choice
from kvswap.errors import UnsupportedError
from kvswap.models.loading import LoadedModel
from kvswap.selection.kvswap import method as own_method
from kvswap.selection.method import Method
from kvswap.selection.tally import Tally
from kvswap.sessions.commits import SessionStore
from kvswap.sessions.quota import Limits
from kvswap.sessions.session import Session
from kvswap.sessions.sharing import common_tokens


class Context:
    """Opens the cache when it is needed, and goes back where something fails.

    ``on_progress`` and ``on_notice`` are as for ``attach``. With ``piece_tokens``, a long prompt of a session is
    computed and committed in pieces of so many tokens. Without ``share``, an empty session computes its first prompt
    instead of looking for another session that stores its beginning.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: Config,
        method: Method | InMemory,
        *,
        share: bool,
        piece_tokens: int | None,
        on_progress: Progress,
        on_notice: Callable[[str], None],
    ) -> None:
        self.session: Session | None = None
        self.cache: KVSwapCache | FullCache | None = None
        self.choice = Choice()
        self.setup_s = self.calibration_s = 0.0
        self._loaded, self._config, self._method = loaded, config, method
        self._share, self._piece_tokens = share, piece_tokens
        self._on_progress, self._notice = on_progress, on_notice
        self._piece: tuple[int, int, int] | None = None  # tokens before a piece, of it, and of the prompt: all new ones
        self._stack = ExitStack()

    def open_session(self, store: SessionStore, verify: bool, limits: Limits | None) -> Session:
        """Use a session, which is closed with the context; where this fails, it is closed at once."""
        try:
            if self._method.name != own_method().name:
                raise UnsupportedError(f"a session with method {self._method.name}", hint="only kvswap keeps sessions")
            self.session = Session(store, self._loaded, self._config, verify=verify, limits=limits, **self._tell())
        except BaseException:
            store.close(discard_empty=True)
            raise
        self._stack.callback(self.session.close, discard_empty=True)
        return self.session

    def open(self) -> KVSwapCache | FullCache:
        """The cache, attached to the model."""
        if self.cache is not None:
            return self.cache
        started_s = time.perf_counter()
        if self.session is not None:
            self.cache = self.session.cache
        else:
            options = {"tokenizer": self._loaded.tokenizer, "method": self._method, **self._tell()}
            self.cache = self._stack.enter_context(attach(self._loaded.model, self._config, **options))
        self.setup_s = time.perf_counter() - started_s
        self.calibration_s = self.cache.trace.calibration_s
        return self.cache

    def take_setup_s(self) -> tuple[float, float]:
        """Seconds that opening the cache and calibration in it took; from now on both are 0."""
        taken = self.setup_s, self.calibration_s
        self.setup_s = self.calibration_s = 0.0
        return taken

    def match(self, ids: list[int], stored_ids: list[int], conversation: bytes, *, continues: bool) -> bool:
        """See that what is stored is the beginning of the prompt ``ids``: take back what is not.

        ``stored_ids`` are those of the conversation before. ``continues``: whether they are known to be the beginning.
        False where nothing could stay, so that the caller goes back to an empty context.
        """
        if self.session is not None:
            self._match_session(self.session, ids, conversation)
            return True
        cache, why = self.cache, "the chat template rewrites earlier turns"
        stored = cache.get_seq_length() if cache is not None and not continues else 0
        kept = common_tokens(ids, stored_ids[:stored])
        if kept == stored:
            return True
        if kept and isinstance(cache, KVSwapCache) and cache.can_truncate:
            cache.truncate(kept)
            self._notice(f"{why}: of {stored:,} tokens the first {kept:,} stay, the rest is computed anew")
            return True
        self._notice(f"{why}, so the whole conversation is computed anew")
        return False

    def prepare(self, ids: list[int], conversation: bytes) -> None:
        """Have a long prompt of a session durable as it is read; ``conversation`` is that before it."""
        if self.session is None:
            return
        self._read_pieces(self.session, ids, conversation)
        self.session.commit_prompt(ids, conversation)

    @property
    def tally(self) -> Tally | None:
        """What decode steps attended to; None where the method does not estimate it."""
        return self.cache.tally if isinstance(self.cache, KVSwapCache) else None

    def begin_tally(self) -> None:
        """Forget which groups earlier answers attended to."""
        if self.tally is not None:
            self.tally.reset()

    def numbers(self, stored_tokens: int) -> dict[str, Any]:
        """What ``RunStats`` says about the session, in which ``stored_tokens`` of a prompt were."""
        session, choice = self.session, self.choice
        return {
            "session": session.name if session else None,
            "resumed_tokens": stored_tokens if session else 0,
            "computed_again": choice.recompute,
            "load_expected_s": choice.load_s,
            "recompute_expected_s": choice.recompute_s,
            "session_written_bytes": session.store.manifest.written_bytes if session else 0,
            "sessions_written_bytes": session.written_bytes.total_bytes if session else 0,
        }

    def rollback(self) -> None:
        """Go back to the last commit of the session. Without a session, drop the cache."""
        self.cache = self._piece = None
        if self.session is not None:
            self.session.rollback()
        else:
            self._stack.close()

    def close(self) -> None:
        """Give the model back as it was, and close the session. May be called twice."""
        self.cache = None
        self._stack.close()

    def _match_session(self, session: Session, ids: list[int], conversation: bytes) -> None:
        source = session.share_prefix(ids, conversation) if self._share else None
        before = session.tokens
        kept = session.truncate(session.common_tokens(ids))
        self.cache = session.cache
        self.choice = session.load_or_recompute(len(ids))
        if self.choice.recompute:
            session.cache.recompute()
        if source is not None:
            self._notice(f"{session.store.label} shares its first {kept:,} tokens with session {source}")
        if kept < before:
            self._notice(
                f"{session.store.label}: this prompt begins with {kept:,} of its {before:,} tokens; these stay"
            )

    def _read_pieces(self, session: Session, ids: list[int], conversation: bytes) -> None:
        """Compute and commit all of a long prompt but its last piece, so that what was read outlives what follows."""
        self._piece = None
        if self._piece_tokens is None or self.choice.recompute:
            return
        first, total = session.tokens, len(ids) - session.tokens
        while len(ids) - session.tokens > self._piece_tokens * 3 // 2:  # a short rest joins the last piece
            self._piece = session.tokens - first, self._piece_tokens, total
            stop = session.tokens + self._piece_tokens + 1  # the last one is not computed yet
            session.append(ids[len(session.token_ids) : stop], interim=conversation)
        done = session.tokens - first
        self._piece = (done, total - done, total) if done else None

    def _report(self, stage: str, done: int, total: int) -> None:
        if stage == "prefill" and self._piece is not None:
            before, piece, all_new = self._piece
            done, total = before + piece * done // max(1, total), all_new
        self._on_progress(stage, done, total)

    def _tell(self) -> dict[str, Any]:
        return {"on_progress": self._report, "on_notice": self._notice}
