"""All errors of kvswap. The message says what happened and why; ``hint`` says what to do next.

``exit_code`` is that of the command line: 2 for mistakes of the user, 1 for faults at run time.
``retryable`` says whether the same call may succeed later without a change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class KVSwapError(Exception):
    """Base of all errors that this package raises on purpose."""

    exit_code = 1
    retryable = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UserError(KVSwapError):
    """Something the caller can correct."""

    exit_code = 2


class ConfigError(UserError):
    """A parameter is unknown or out of range."""


class InputError(UserError):
    """A document, question or prompt cannot be used."""


class ModelError(UserError):
    """The model cannot be found, loaded or attached to."""


class UnsupportedError(UserError):
    """A generation mode or call that a cache on disk cannot serve."""


class StorageError(UserError):
    """The folder for the cache cannot be used: unwritable, in memory, too small."""


class OpenFilesError(UserError):
    """No more files may be open. That says nothing about the file that was to be opened, so it is never damage."""


class SessionError(UserError):
    """A session cannot be used as asked: absent, in use, of another model, or made by a newer version."""


class MemoryBudgetError(UserError):
    """The memory limit is too small for the request.

    ``minimum_bytes`` is the smallest limit that works, ``longest_tokens`` the longest context under the given one,
    ``parts`` what each part needs at the smallest limit, in bytes by name; empty where the parts are not known.
    """

    def __init__(
        self,
        message: str,
        *,
        minimum_bytes: int = 0,
        longest_tokens: int = 0,
        parts: dict[str, int] | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(message, hint=hint)
        self.minimum_bytes = minimum_bytes
        self.longest_tokens = longest_tokens
        self.parts = parts or {}


class DiskError(KVSwapError):
    """The disk failed while the engine ran."""

    retryable = True


class DiskReadError(DiskError):
    """Bytes did not arrive, also after retries."""


class DiskWriteError(DiskError):
    """Bytes could not be written."""


class DiskFullError(DiskWriteError):
    """No space was left on the device in the middle of a run."""


class DamagedError(DiskReadError):
    """Stored bytes are not what was written, or were damaged on their way to memory. Nothing is deleted."""


@contextmanager
def on_error(undo: Callable[[], object]) -> Iterator[None]:
    """Call ``undo`` where the block fails; see ``undo_after``."""
    try:
        yield
    except BaseException as error:
        undo_after(error, undo)
        raise


def undo_after(first: BaseException, undo: Callable[[], object]) -> None:
    """Call ``undo``, which cleans up after ``first``. What fails in it is a note of ``first`` and hides nothing."""
    try:
        undo()
    except Exception as second:  # noqa: BLE001 - the first error is the one to raise
        first.add_note(f"after that: {second}")
