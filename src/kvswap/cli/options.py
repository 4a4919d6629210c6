"""Options that ``run`` and ``chat`` share, and those about weights, which all commands with a model have.

``read_options`` checks them before torch or a model is loaded and gives ``RunOptions``, which open the session and load
the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from kvswap.cli.configs import TunedChoice, read_config

if TYPE_CHECKING:
    from kvswap.app.documents import Document
    from kvswap.app.engine import Engine
    from kvswap.app.prompt import Message
    from kvswap.config import Config
    from kvswap.sessions.commits import SessionStore
    from kvswap.sessions.quota import Limits

_DTYPES = click.Choice(["auto", "float32", "bfloat16", "float16"])
_WEIGHTS = (
    click.option(
        "--weights",
        type=click.Choice(["auto", "float", "q8", "q4"]),
        default="auto",
        show_default=True,
        help="auto: as the model's files have them. float: convert a .gguf file to float32, once. q8, q4: pack a "
        "checkpoint's weights to 8 or 4 bits, once (CPU).",
    ),
    click.option("--no-mmap", is_flag=True, help="Copy the weights into memory instead of mapping their file."),
)
_SHARED = (
    click.option(
        "--model", required=True, metavar="MODEL", help="Local directory, .gguf file, hub id, or smollm2-135m."
    ),
    click.option(
        "--document",
        "documents",
        multiple=True,
        metavar="FILE",
        help="Text, Markdown, source code or PDF, before the first question; may be given several times.",
    ),
    click.option(
        "--kv-memory",
        metavar="SIZE",
        help="Memory that the KV cache may hold, such as 24MiB.  [default: auto, an eighth of the full 16-bit cache, "
        "at least what keeps 2,048 tokens whole]",
    ),
    click.option("--kv-dir", metavar="DIR", help="Folder on a disk for KV files.  [default: the user's cache folder]"),
    click.option("--max-new-tokens", type=int, default=256, show_default=True, metavar="N", help="Longest answer."),
    click.option(
        "--temperature", type=float, default=0.0, show_default=True, metavar="T", help="0 takes the likeliest token."
    ),
    click.option(
        "--top-p",
        type=float,
        default=1.0,
        show_default=True,
        metavar="P",
        help="Sample from this share of probability.",
    ),
    click.option(
        "--top-k",
        type=int,
        default=0,
        show_default=True,
        metavar="K",
        help="Sample from the K likeliest tokens; 0: from all.",
    ),
    click.option(
        "--min-p",
        type=float,
        default=0.0,
        show_default=True,
        metavar="P",
        help="Sample from tokens that have at least this share of the likeliest one's probability.",
    ),
    click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        help="End the answer before this text; may be given several times.",
    ),
    click.option("--system", metavar="TEXT", help="Instructions that come before everything else."),
    click.option("--seed", type=int, metavar="S", help="Make sampling repeatable."),
    click.option(
        "--dtype",
        type=_DTYPES,
        default="auto",
        show_default=True,
        help="Compute dtype. auto: the checkpoint's, or float32 on a CPU without bfloat16 instructions.",
    ),
    *_WEIGHTS,
    click.option(
        "--config", "config_file", metavar="FILE", help="JSON object of further settings; options here override it."
    ),
    click.option(
        "--session",
        "session_name",
        metavar="NAME",
        help="Keep the context on disk under this name, or continue the session of that name.",
    ),
    click.option(
        "--encrypt", is_flag=True, help="Encrypt a new session, with the key in KVSWAP_SESSION_KEY or the keyring."
    ),
    click.option(
        "--disk-quota",
        metavar="SIZE",
        help="Disk for all sessions together; closed ones make room, small ones first, then those used longest ago.  "
        "[default: no limit]",
    ),
    click.option(
        "--write-limit", metavar="SIZE", help="Most that may be written for sessions a day.  [default: no limit]"
    ),
    click.option("--no-verify", is_flag=True, help="Do not compare what is read of a session with its checksums."),
    click.option(
        "--check-quality",
        is_flag=True,
        help="Repeat some steps with exact attention, in 5 % of the time, and say what selection costs.",
    ),
    click.option(
        "--show-sources",
        type=click.IntRange(1, 100),
        metavar="N",
        help="After each answer, show the N passages that it attended to most.",
    ),
)


def shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the shared options to a command, which passes them to ``read_options``."""
    return _add(_SHARED, command)


def with_weights(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --weights and --no-mmap to a command, which passes them to ``load_weights``."""
    return _add(_WEIGHTS, command)


def _add(options: Iterable[Callable[..., Any]], command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(tuple(options)):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The values of the shared options, checked as far as that is possible without a model."""

    model: str
    config: Config
    tuned: TunedChoice | None
    documents: list[Document]
    system: str | None
    sampling: dict[str, Any]
    limits: Limits
    session_name: str | None
    encrypt: bool
    check_quality: bool
    show_sources: int | None
    verify: bool
    dtype: str
    weights: str
    no_mmap: bool

    def open_session(self, method: str = "kvswap") -> SessionStore | None:
        """Open or create the session, before a model is loaded; None without one. Raises ConfigError, SessionError."""
        from kvswap.errors import ConfigError
        from kvswap.sessions.catalog import open_or_create_store

        if self.session_name is None:
            if self.encrypt:
                raise ConfigError("--encrypt without --session", hint="only sessions stay on disk; name one")
            return None
        if method != "kvswap":
            raise ConfigError(f"--session with --method {method}", hint="only kvswap keeps sessions")
        return open_or_create_store(self.config.kv_dir, self.session_name, encrypt=self.encrypt)

    def load(
        self,
        display: Any,
        session: SessionStore | None,
        *,
        method: str = "kvswap",
        messages: Sequence[Message] | None = None,
    ) -> Engine:
        """Load the model and give an engine that reports to ``display``.

        The engine closes the session; where loading fails, it is closed here. A tuned file gives the configuration for
        the length of ``messages``. Without messages, or with a session, it gives that of the longest context.
        """
        from kvswap.cli.loading import load_weights

        try:
            loaded = load_weights(self.model, display, dtype=self.dtype, weights=self.weights, no_mmap=self.no_mmap)
            config = self.config
            if self.tuned is not None:
                new_tokens = self.sampling["max_new_tokens"]
                config = self.tuned.choose(loaded, messages=None if session else messages, new_tokens=new_tokens)
        except BaseException:
            if session is not None:
                session.close(discard_empty=True)
            raise
        from kvswap.app.engine import SOURCES, load
        from kvswap.lab.rivals import find

        return load(
            loaded,
            config,
            method=find(method),
            session=session,
            verify=self.verify,
            limits=self.limits,
            check_quality=self.check_quality,
            sources=self.show_sources or SOURCES,
            on_progress=display.progress,
            on_notice=display.notice,
        )


def read_options(
    *,
    model: str,
    documents: tuple[str, ...],
    kv_memory: str | None,
    kv_dir: str | None,
    dtype: str,
    weights: str,
    no_mmap: bool,
    config_file: str | None,
    session_name: str | None,
    encrypt: bool,
    disk_quota: str | None,
    write_limit: str | None,
    no_verify: bool,
    check_quality: bool,
    show_sources: int | None,
    system: str | None,
    **sampling: Any,
) -> RunOptions:
    """Check the shared options. Raises ConfigError, InputError."""
    from kvswap.app.documents import read_document
    from kvswap.models.sampling import Sampling

    checked_sampling = dataclasses.asdict(Sampling(**sampling))
    config, tuned = read_config(config_file, kv_memory=kv_memory, kv_dir=kv_dir)
    return RunOptions(
        model=model,
        config=config,
        tuned=tuned,
        documents=[read_document(path) for path in documents],
        system=system,
        sampling=checked_sampling,
        limits=read_limits(disk_quota, write_limit),
        session_name=session_name,
        encrypt=encrypt,
        check_quality=check_quality,
        show_sources=show_sources,
        verify=not no_verify,
        dtype=dtype,
        weights=weights,
        no_mmap=no_mmap,
    )


def read_limits(disk_quota: str | None, write_limit: str | None) -> Limits:
    """The limits that --disk-quota and --write-limit state. Raises ConfigError."""
    from kvswap.sessions.quota import Limits
    from kvswap.units import parse_bytes

    return Limits(
        quota_bytes=None if disk_quota is None else parse_bytes(disk_quota, name="--disk-quota"),
        write_bytes=None if write_limit is None else parse_bytes(write_limit, name="--write-limit"),
    )
