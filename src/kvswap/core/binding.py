"""What a cache needs of the session that its context comes from and is committed to.

``sessions/binding.py`` implements it. The thread that runs the model calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from kvswap.config import Config
from kvswap.core.batch_state import BatchState
from kvswap.core.load_or_recompute import Rates
from kvswap.disk.backend import ReadBackend
from kvswap.selection.basis import Basis
from kvswap.store.persistent import PersistentFiles


class Binding(Protocol):
    """One session under one cache."""

    tokens: int
    """Tokens that the session stores when the cache begins."""

    @property
    def alignment_bytes(self) -> int:
        """What the session's groups are aligned to on disk; 0 in an empty session."""

    def config(self, config: Config) -> Config:
        """``config`` with the settings that the session has fixed. Raises ConfigError where another was asked for."""

    def bases(self, device: torch.device) -> list[tuple[Basis, int]] | None:
        """The directions of every layer's sketch and their bits, as stored; None in an empty session."""

    def reserve(self, nbytes: int, *, planned: bool = False) -> None:
        """Called before files take ``nbytes`` more, and with all that is ``planned``; raises StorageError to refuse."""

    def files(self, backend: ReadBackend, layers: int) -> PersistentFiles:
        """The session's files, opened in ``backend``."""

    def restore_layers(
        self, layers: Sequence[Any], orders: Sequence[int | None], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Give the cache layers that stay in memory (those whose order is None) their stored state."""

    def restore(self, state: BatchState) -> None:
        """Bring what is committed back into a new state."""

    def commit(
        self, state: BatchState, ids: Sequence[int], conversation: bytes, *, interim: bool, rates: Rates
    ) -> None:
        """Make the state durable with its token ids and the conversation as JSON.

        There is at most one id more than tokens. The next commit replaces an ``interim`` one. Raises DiskError.
        """
