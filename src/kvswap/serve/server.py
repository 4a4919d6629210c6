"""Starts the worker and the HTTP server, and ends both in order.

``serve`` returns after SIGINT or SIGTERM: running requests are told, the worker leaves its job at the next chunk or
token, and its session is closed with what was read.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import uvicorn

from kvswap.errors import ConfigError
from kvswap.models.adapter import check_token_ids, context_limit
from kvswap.models.loading import LoadedModel
from kvswap.serve.answers import Answers, Settings
from kvswap.serve.app import build
from kvswap.serve.jobs import Worker
from kvswap.serve.metrics import Metrics
from kvswap.serve.service import Service

GRACE_S, WORKER_GRACE_S = 5, 60.0
_BACKLOG = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """How the server is reached. ``keys`` are those of its API; ``hosts`` are names it may be called by."""

    alias: str
    keys: Sequence[str] = ()
    hosts: Sequence[str] = ()
    max_waiting: int = 16
    max_new_tokens: int = 2048


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before a model is loaded. Raises ConfigError."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, number)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host}: {error}", hint="give an address of this machine") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError(f"--port {port}: {error.strerror}", hint="choose another with --port") from error
    return listening


def read_keys(path: str) -> list[str]:
    """The API keys in a file, one a line. Raises ConfigError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path}: {error}", hint="give a text file with one key a line") from error
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ConfigError(f"--api-key-file {path}: it has no key", hint="write one key a line")
    return keys


class Server(uvicorn.Server):
    """Uvicorn's server, which also ends the worker's jobs when it shuts down."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self._worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End all jobs first: connections wait for them."""
        self._worker.stop()
        await super().shutdown(sockets)


def create(loaded: LoadedModel, settings: Settings, listening: Listening) -> tuple[Server, Worker]:
    """The server and its worker, neither of them started."""
    answers = Answers(loaded, settings)
    worker = Worker(answers.answer, answers.close, max_waiting=listening.max_waiting)
    service = Service(
        tokenizer=loaded.tokenizer,
        check_ids=partial(check_token_ids, loaded.model),
        name=listening.alias,
        limit_tokens=context_limit(loaded.model),
        max_new_tokens=listening.max_new_tokens,
        worker=worker,
        answers=answers,
        kv_dir=settings.config.kv_dir,
        metrics=Metrics(lambda: worker.waiting, lambda: worker.running),
    )
    app = build(service, keys=listening.keys, hosts=listening.hosts)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
        ws="none",
        lifespan="off",
    )
    return Server(config, worker), worker


def serve(loaded: LoadedModel, settings: Settings, listening: Listening, sockets: list[socket.socket]) -> None:
    """Serve until a signal arrives."""
    server, worker = create(loaded, settings, listening)
    worker.start()
    try:
        server.run(sockets=sockets)
    finally:
        worker.stop()
        worker.join(WORKER_GRACE_S)
