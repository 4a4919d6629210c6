"""Where kvswap keeps what: the one place that decides on folders.

================  =================================================  ==========================
what              folder                                             moved by
================  =================================================  ==========================
KV files          ``home()/kv``                                      ``kv_dir`` (``--kv-dir``)
sessions          ``home()/kv/sessions``                             ``kv_dir`` (``--kv-dir``)
calibration       ``home()/calibration``
tables, profiles  ``home()/tables``, ``home()/profiles``
converted models  ``home()/models``
logs of failures  ``home()/logs``
================  =================================================  ==========================

``home()`` is the folder that the environment variable KVSWAP_HOME names, else the user's cache folder as the system
has it (``~/.cache/kvswap``, ``$XDG_CACHE_HOME/kvswap``, ``~/Library/Caches/kvswap``). Nothing here creates a folder,
and the environment is read at each call. Any thread.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from kvswap.errors import InputError, StorageError

VARIABLE = "KVSWAP_HOME"
ELSEWHERE = f"choose another folder with --kv-dir (kv_dir in Python) or {VARIABLE}"
"""What to do about a folder for KV files that cannot be used."""


def home() -> Path:
    """The folder of everything that kvswap keeps; absolute. Raises StorageError where there is none."""
    if chosen := os.environ.get(VARIABLE):
        return absolute(chosen)
    try:
        return platformdirs.user_cache_path("kvswap")
    except RuntimeError as error:  # neither HOME nor an entry of this user in the system's list
        raise StorageError(
            "this user has no home folder to keep files in",
            hint=f"set the environment variable {VARIABLE} to a folder on a disk, or give --kv-dir for KV files",
        ) from error


def kv_folder(kv_dir: str | Path | None) -> Path:
    """The folder for KV files: the given one, else the one below ``home()``; absolute. Raises StorageError."""
    return absolute(kv_dir) if kv_dir else home() / "kv"


def sessions_folder(kv_dir: str | Path | None) -> Path:
    """The folder of all sessions, below that of the KV files. Raises StorageError."""
    return kv_folder(kv_dir) / "sessions"


def calibration_folder() -> Path:
    """Statistics of the keys of each model, measured once. Raises StorageError."""
    return home() / "calibration"


def tables_folder() -> Path:
    """Quality tables of each model, for ``kvswap tune``. Raises StorageError."""
    return home() / "tables"


def profiles_folder() -> Path:
    """Profiles of this machine with each model, for ``kvswap tune``. Raises StorageError."""
    return home() / "profiles"


def models_folder() -> Path:
    """Models that were converted from GGUF files, and packed weights of checkpoints. Raises StorageError."""
    return home() / "models"


def logs_folder() -> Path:
    """Logs of commands that failed in a way nobody expected. Raises StorageError."""
    return home() / "logs"


def user_path(path: str | Path) -> Path:
    """A path that a user gave, ``~`` and ``~user`` replaced. Raises InputError for a user who does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"path {path}: {error}", hint="give the path without ~") from error


def absolute(path: str | Path) -> Path:
    """The absolute path, ``~`` and ``~user`` replaced. Raises StorageError for a user who does not exist."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise StorageError(f"folder {path}: {error}", hint=ELSEWHERE) from error
