"""Options that ``run`` and ``chat`` share, and what comes of them before anything heavy is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from kvswap.cli.configs import TunedChoice, read_config

if TYPE_CHECKING:
    from kvswap.app.documents import Document
    from kvswap.app.engine import Engine
    from kvswap.app.prompt import Request
    from kvswap.config import Config
    from kvswap.models.loading import LoadedModel
    from kvswap.sessions.folder import SessionFolder
    from kvswap.sessions.quota import Limits

_DTYPES = click.Choice(["auto", "float32", "bfloat16", "float16"])
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
        help="Memory that the KV cache may hold, such as 24MiB.  [default: auto, an eighth of the full 16-bit cache]",
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
    click.option("--seed", type=int, metavar="S", help="Make sampling repeatable."),
    click.option(
        "--dtype",
        type=_DTYPES,
        default="auto",
        show_default=True,
        help="Compute dtype. auto: the checkpoint's, or float32 on a CPU without bfloat16 instructions.",
    ),
    click.option("--no-mmap", is_flag=True, help="Copy the weights into memory instead of mapping their file."),
    click.option(
        "--config", "config_file", metavar="FILE", help="JSON object of further settings; options here override it."
    ),
    click.option(
        "--session",
        "session_name",
        metavar="NAME",
        help="Keep the context on disk under this name, or go on from where it was.",
    ),
    click.option(
        "--encrypt", is_flag=True, help="Encrypt a new session, with the key in KVSWAP_SESSION_KEY or the keyring."
    ),
    click.option(
        "--disk-quota",
        metavar="SIZE",
        help="Disk for all sessions together; closed ones make room, least recently used first.  [default: no limit]",
    ),
    click.option(
        "--write-limit", metavar="SIZE", help="Most that may be written for sessions a day.  [default: no limit]"
    ),
    click.option("--no-verify", is_flag=True, help="Do not compare what is read of a session with its checksums."),
    click.option(
        "--check-quality",
        is_flag=True,
        help="Do some steps over again with exact attention, in 5 % of the time, and tell what selection costs.",
    ),
)


def shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the shared options; it hands them to ``read_options``."""
    for option in reversed(_SHARED):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the shared options say, checked as far as that goes without a model."""

    model: str
    config: Config
    tuned: TunedChoice | None
    texts: list[Document]
    sampling: dict[str, Any]
    limits: Limits
    session_name: str | None
    encrypt: bool
    check_quality: bool
    loading: dict[str, Any]

    def open_session(self, method: str = "kvswap") -> SessionFolder | None:
        """Open or make the session before anything heavy is loaded. Raises ConfigError, SessionError."""
        from kvswap.errors import ConfigError
        from kvswap.sessions.shelf import open_or_create

        if self.session_name is None:
            if self.encrypt:
                raise ConfigError("--encrypt without --session", hint="only sessions stay on disk; name one")
            return None
        if method != "kvswap":
            raise ConfigError(f"--session with --method {method}", hint="only kvswap keeps sessions")
        return open_or_create(self.config.kv_dir, self.session_name, encrypt=self.encrypt)

    def load(
        self, display: Any, session: SessionFolder | None, *, method: str = "kvswap", request: Request | None = None
    ) -> Engine:
        """An engine that tells ``display`` what it does. The session is closed with it, also when it cannot be loaded.

        A tuned file is asked for the configuration of ``request``; without one, for that of the longest context.
        """
        from kvswap.cli.loading import load_weights
        from kvswap.sessions.shelf import close_session

        choose: Callable[[LoadedModel], Config] | None = None
        if self.tuned is not None:
            new_tokens = self.sampling["max_new_tokens"]
            choose = partial(self.tuned.choose, request=None if session else request, new_tokens=new_tokens)
        verify = self.loading["verify"]
        try:
            loaded = load_weights(self.model, display, dtype=self.loading["dtype"], mmap=self.loading["mmap"])
            config = choose(loaded) if choose is not None else self.config
        except BaseException:
            if session is not None:
                close_session(session)
            raise
        from kvswap.app.engine import load
        from kvswap.lab.rivals import find

        tell: dict[str, Any] = {"on_progress": display.progress, "on_notice": display.notice}
        engine = load(loaded, config, method=find(method), session=session, verify=verify, limits=self.limits, **tell)
        engine.check_quality = self.check_quality
        return engine


def read_options(
    *,
    model: str,
    documents: tuple[str, ...],
    kv_memory: str | None,
    kv_dir: str | None,
    dtype: str,
    no_mmap: bool,
    config_file: str | None,
    session_name: str | None,
    encrypt: bool,
    disk_quota: str | None,
    write_limit: str | None,
    no_verify: bool,
    check_quality: bool,
    **sampling: Any,
) -> Wanted:
    """Check the shared options. Raises ConfigError, InputError."""
    from kvswap.app.documents import read_document
    from kvswap.models.sampling import Sampling

    checked = dataclasses.asdict(Sampling(**sampling))
    config, tuned = read_config(config_file, kv_memory=kv_memory, kv_dir=kv_dir)
    return Wanted(
        model=model,
        config=config,
        tuned=tuned,
        texts=[read_document(path) for path in documents],
        sampling=checked,
        limits=limits_of(disk_quota, write_limit),
        session_name=session_name,
        encrypt=encrypt,
        check_quality=check_quality,
        loading={"dtype": dtype, "mmap": not no_mmap, "verify": not no_verify},
    )


def limits_of(disk_quota: str | None, write_limit: str | None) -> Limits:
    """The limits that two options state. Raises ConfigError."""
    from kvswap.sessions.quota import Limits
    from kvswap.units import parse_bytes

    return Limits(
        quota_bytes=None if disk_quota is None else parse_bytes(disk_quota, name="--disk-quota"),
        write_bytes=None if write_limit is None else parse_bytes(write_limit, name="--write-limit"),
    )
