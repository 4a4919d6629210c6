"""The queue between the event loop and the one thread that owns the model.

``Worker.submit`` is called by the event loop, ``Job.tell`` by the worker's thread; events arrive in the loop in order.
``Job.cancel`` may be called by any thread, more than once, and after the end. A job that is cancelled before its turn
leaves the queue at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvswap.app.prompt import Message
from kvswap.app.stats import RunStats
from kvswap.errors import KVSwapError
from kvswap.models.logprobs import TokenLogprob
from kvswap.serve.api_errors import SERVER, ApiError

RETRY_AFTER_S = 5
_logger = logging.getLogger("kvswap.serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a request wants from the model, whichever endpoint it came to.

    Either ``messages`` or ``text``, which is continued as it is. ``ids`` are the token ids of the prompt as it stands.
    With ``store``, the conversation stays on disk. ``echo`` gives the prompt back, with log-probabilities where
    ``top_logprobs`` asks for them.
    """

    ids: list[int]
    sampling: dict[str, Any]
    messages: list[Message] = field(default_factory=list)
    text: str | list[int] = ""
    tools: list[dict[str, Any]] | None = None
    top_logprobs: int | None = None
    store: bool = True
    echo: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """So many of all tokens of the prompt are read, those that were stored included."""

    processed: int
    total: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of the answer, and the tokens since the last piece where log-probabilities were asked for."""

    text: str
    logprobs: list[TokenLogprob]


@dataclass(frozen=True, slots=True)
class Echo:
    """Log-probabilities of the prompt's tokens, None for the first."""

    logprobs: list[TokenLogprob | None]


@dataclass(frozen=True, slots=True)
class Done:
    """The answer is complete; None where a prompt was scored and nothing generated."""

    stats: RunStats | None


@dataclass(frozen=True, slots=True)
class Failed:
    """There will be no more of the answer."""

    error: BaseException


Event = Progress | Piece | Echo | Done | Failed


class Job:
    """A question on its way. Made in the event loop that reads its ``events``."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Have the work end soon."""
        self._cancelled.set()

    def tell(self, event: Event) -> None:
        """Send an event to the event loop; it is dropped where that has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class Errand:
    """Something small that only the worker's thread may do, between two answers. ``result`` is awaited by the loop."""

    cancelled = False

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self._loop = work, asyncio.get_running_loop()
        self.result: asyncio.Future[Any] = self._loop.create_future()

    def run(self) -> None:
        """Do it, in the worker's thread."""
        try:
            value = self._work()
        except Exception as error:  # noqa: BLE001 - raised where the result is awaited
            self.tell(Failed(error))
        else:
            self._settle(lambda: self.result.set_result(value))

    def cancel(self) -> None:
        """Nothing: what has begun is done in a moment."""

    def tell(self, event: Event) -> None:
        """Pass on that it failed."""
        if isinstance(event, Failed):
            error = event.error
            self._settle(lambda: self.result.set_exception(error))

    def _settle(self, settle: Callable[[], None]) -> None:
        def once() -> None:
            if not self.result.done():
                settle()

        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(once)


class Worker:
    """Answers jobs in order, in a thread of its own. ``answer(job)`` runs there, and at the end ``close()``."""

    def __init__(self, answer: Callable[[Job], None], close: Callable[[], None], *, max_waiting: int) -> None:
        self._answer, self._close, self._max_waiting = answer, close, max_waiting
        self._turn = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._errands: deque[Errand] = deque()
        self._running: Job | Errand | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kvswap-serve", daemon=True)

    @property
    def waiting(self) -> int:
        """Jobs that wait for their turn."""
        return len(self._waiting)

    @property
    def running(self) -> bool:
        """Whether a job is being answered."""
        return self._running is not None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, question: Question) -> Job:
        """Queue a question. Raises ApiError where too many wait already."""
        job = Job(question)
        with self._turn:
            if self._stopping:
                raise ApiError(503, "the server is ending", kind=SERVER, retry_after_s=RETRY_AFTER_S)
            if self._running is not None and len(self._waiting) >= self._max_waiting:
                message = f"{len(self._waiting)} requests wait already, which is the limit; try again later"
                raise ApiError(503, message, kind=SERVER, code="overloaded", retry_after_s=RETRY_AFTER_S)
            self._waiting.append(job)
            self._turn.notify()
        return job

    def send(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        """Have ``work`` done in the worker's thread before the next job. Raises ApiError where the server ends."""
        errand = Errand(work)
        with self._turn:
            if self._stopping:
                raise ApiError(503, "the server is ending", kind=SERVER, retry_after_s=RETRY_AFTER_S)
            self._errands.append(errand)
            self._turn.notify()
        return errand.result

    def withdraw(self, job: Job) -> None:
        """Cancel a job, and take it out of the queue where its turn has not come."""
        job.cancel()
        with self._turn, contextlib.suppress(ValueError):
            self._waiting.remove(job)

    def stop(self) -> None:
        """Cancel all jobs and have the thread end; returns at once."""
        with self._turn:
            self._stopping = True
            jobs = [*self._errands, *self._waiting, *([self._running] if self._running else [])]
            self._waiting.clear()
            self._errands.clear()
            self._turn.notify()
        for job in jobs:
            job.cancel()
            job.tell(Failed(ApiError(503, "the server is ending", kind=SERVER, retry_after_s=RETRY_AFTER_S)))

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread after ``stop``; whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while (job := self._next()) is not None:
                try:
                    if isinstance(job, Errand):
                        job.run()
                    else:
                        self._answer(job)
                except Exception as error:  # the thread has to live on for the next job
                    if as_unexpected(error):
                        _logger.exception("a request failed")
                    job.tell(Failed(error))
                finally:
                    with self._turn:
                        self._running = None
        finally:
            self._close()

    def _next(self) -> Job | Errand | None:
        with self._turn:
            while not self._waiting and not self._errands and not self._stopping:
                self._turn.wait()
            if self._stopping:
                return None
            self._running = self._errands.popleft() if self._errands else self._waiting.popleft()
            return self._running


def as_unexpected(error: BaseException) -> bool:
    """Whether an error is a fault of the program, to be logged with its traceback."""
    return not isinstance(error, KVSwapError | ApiError)
