"""What the command line does about an exception that nothing else has caught: one line, and a log with the traceback.

``kvswap.cli.main`` calls ``report`` for its own thread, and ``install`` makes other threads do the same. A log lies in
the cache folder, or else in the folder for temporary files. Only its owner can read it, because it has the words of the
command in it. The newest ``KEPT_LOGS`` logs are kept. Nothing here raises.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from kvswap.disk.folders import logs_folder
from kvswap.errors import KVSwapError

KEPT_LOGS = 20
_LOG = logging.getLogger("kvswap.cli")
_DOING = {
    "cli": "reading the command or showing its results",
    "lab": "comparing methods",
    "tuning": "measuring or tuning",
    "app": "preparing the text or answering",
    "app.documents": "reading a document",
    "sessions": "working on a stored session",
    "core": "computing with the model",
    "memory": "dividing the memory",
    "models": "loading or running the model",
    "store": "storing or reading the KV cache",
    "selection": "selecting tokens",
    "disk": "working on files",
    "native": "computing with the model",
}
"""What kvswap does in each room, for the message."""


def report(error: BaseException, arguments: Sequence[str]) -> str:
    """Write the log of an unexpected exception; the line to show about it."""
    name = next((word for word in arguments if not word.startswith("-")), "")
    text = "".join(traceback.format_exception(error))
    about = [f"time: {time.strftime('%Y-%m-%d %H:%M:%S %z')}", f"command: {list(arguments)!r}"]
    about += [f"while: {_doing(error.__traceback__)}", f"Python {sys.version}, {platform.platform()}", _versions()]
    log = _write("\n".join([*about, "", text]))
    where = f"the log is in {log}" if log is not None else "no log could be written"
    reason = " ".join(str(error).split())[:300]
    what = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    shown = "--verbose shows the details here"
    return f"kvswap {name[:40]} failed while {_doing(error.__traceback__)}: {what}; {where}, and {shown}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; torch says it with a RuntimeError."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))
    )


def install(show: Callable[[str], None], arguments: Sequence[str]) -> None:
    """Let other threads report as the main thread does, and log what finalizers raise as a debug message."""

    def in_thread(found: threading.ExceptHookArgs) -> None:
        if found.exc_value is not None and not isinstance(found.exc_value, SystemExit):
            _LOG.debug("an exception in a thread", exc_info=found.exc_value)
            show(report(found.exc_value, arguments))

    def in_finalizer(found: sys.UnraisableHookArgs) -> None:
        _LOG.debug("an exception in a finalizer", exc_info=found.exc_value)

    threading.excepthook = in_thread
    sys.unraisablehook = in_finalizer


def _doing(trace: TracebackType | None) -> str:
    """What kvswap was doing, by the innermost of its modules in a traceback."""
    found = "starting"
    for frame, _ in traceback.walk_tb(trace):
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith("kvswap."):
            inside = module.removeprefix("kvswap.")
            found = _DOING.get(inside) or _DOING.get(inside.partition(".")[0]) or found
    return found


def _versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("kvswap", "torch", "transformers", "numpy", "pypdf"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def _write(text: str) -> Path | None:
    """Write a log; its path, or None where no folder takes it."""
    name = f"kvswap-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-"
    for folder in _folders():
        with contextlib.suppress(OSError, ValueError):
            folder.mkdir(parents=True, exist_ok=True)
            number, path = tempfile.mkstemp(suffix=".log", prefix=name, dir=folder)  # mode 0600
            with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            _remove_old(folder)
            return Path(path)
    return None


def _folders() -> list[Path]:
    """Where a log may lie, the best place first."""
    found = []
    for choose in (logs_folder, tempfile.gettempdir):
        with contextlib.suppress(KVSwapError, OSError, ValueError, RuntimeError):
            found.append(Path(choose()))
    return found


def _remove_old(folder: Path) -> None:
    if folder.name == "logs":  # the folder for temporary files is not ours
        for path in sorted(folder.glob("kvswap-*.log"))[:-KEPT_LOGS]:
            path.unlink(missing_ok=True)
