"""Which conversations are on disk: an index of all sessions of a folder that this model can continue.

A conversation is found by its messages or by its token ids. Conversations of this server have names that begin with
``chat-``; those are continued in place. Sessions that somebody named are never changed: a request that begins as one of
them goes on in a fork. The index is read from disk when the server starts, and follows what the server does. A session
that another program removes is noticed when it is opened. One thread.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvswap.app.prompt import Conversation, Message
from kvswap.errors import KVSwapError
from kvswap.sessions.binding import compatible
from kvswap.sessions.catalog import entries
from kvswap.sessions.commits import SessionStore
from kvswap.sessions.manifest import Model
from kvswap.sessions.sharing import MIN_SHARED_TOKENS, common_tokens

PREFIX = "chat-"
_logger = logging.getLogger("kvswap.serve")


@dataclass(frozen=True, slots=True)
class Stored:
    """One stored conversation.

    ``ids`` int32 ``[n]`` are its token ids, of which ``tokens`` have K, V. ``key`` identifies its messages.
    """

    name: str
    ids: NDArray[np.int32]
    tokens: int
    key: str

    @property
    def own(self) -> bool:
        """Whether it belongs to the server, which may add to it."""
        return self.name.startswith(PREFIX)


class Library:
    """All stored conversations, by name."""

    def __init__(self) -> None:
        self._stored: dict[str, Stored] = {}

    def __len__(self) -> int:
        return len(self._stored)

    def read(self, root: Path, model: Model, config: Any) -> None:
        """Read the index from the folder of all sessions. What cannot be read is left out, and said."""
        for found in entries(root):
            if found.manifest is not None and compatible(found.manifest, model, config):
                self.read_one(found.path)

    def put(self, name: str, ids: Sequence[int], tokens: int, messages: Sequence[Message]) -> None:
        """Remember what a conversation contains now."""
        self._stored[name] = Stored(name, np.array(ids, np.int32), tokens, keys(messages)[-1] if messages else "")

    def has(self, name: str, ids: Sequence[int]) -> bool:
        """Whether a conversation has these token ids."""
        stored = self._stored.get(name)
        return stored is not None and np.array_equal(stored.ids, np.array(ids, np.int32))

    def drop(self, name: str) -> None:
        """Forget a conversation."""
        self._stored.pop(name, None)

    def continued_by(self, messages: Sequence[Message]) -> Stored | None:
        """The longest conversation of the server that the messages go on from, with its last answer."""
        by_key = {each.key: each for each in self._stored.values() if each.own and each.key}
        return next((by_key[key] for key in reversed(keys(messages[:-1])) if key in by_key), None)

    def longest_prefix(self, ids: Sequence[int]) -> tuple[Stored | None, int]:
        """The conversation that has most tokens in common with the beginning of ``ids``, and how many they are."""
        best, most = None, MIN_SHARED_TOKENS - 1
        for stored in self._stored.values():
            common = min(common_tokens(ids, stored.ids), stored.tokens)  # type: ignore[arg-type]
            whole = common == stored.tokens and stored.own
            if common > most or (common == most and best is not None and whole):
                best, most = stored, common
            elif whole and common and best is None:  # short, but nothing is lost by going on from it
                best, most = stored, max(common, 0)
        return best, most if best is not None else 0

    def read_one(self, path: Path) -> None:
        """Read one session into the index."""
        try:
            with SessionStore.open(path, write=False) as store:
                contents = store.load(tail_only=True)
                if contents is None:
                    return
                conversation = Conversation.from_json(contents.conversation, contents.ids, store.label)
        except (KVSwapError, OSError) as error:
            _logger.warning("session %s is left out: %s", path.name, error)
            return
        self.put(path.name, contents.ids, contents.tokens, conversation.messages)


def new_name() -> str:
    """A name that no conversation has."""
    return f"{PREFIX}{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"


def keys(messages: Iterable[Message]) -> list[str]:
    """What identifies the first message, the first two, and so on; spaces at the ends of a text do not count."""
    digest, found = hashlib.sha256(), []
    for each in messages:
        calls = [call.get("function") for call in each.extra.get("tool_calls") or [] if isinstance(call, dict)]
        content = f"{each.context}\n\n{each.content}" if each.context else each.content
        digest.update(json.dumps([each.role, content.strip(), calls], sort_keys=True).encode())
        found.append(digest.hexdigest())
    return found
