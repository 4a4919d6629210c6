"""A schedule over one session, run by a child process that may be killed at any moment. Not a test."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from kvswap.config import Config
from kvswap.errors import SessionError
from kvswap.models.loading import LoadedModel
from kvswap.sessions.catalog import entries, prune, session_path
from kvswap.sessions.check import check
from kvswap.sessions.encryption import KEY_VARIABLE
from kvswap.sessions.session import Session
from tests.helpers.families import tiny_model, tokens
from tests.helpers.folders import byte_tokenizer

torch.set_num_threads(1)  # children are forked
MODEL = LoadedModel(tiny_model("llama", vocab_size=300), byte_tokenizer(), "tiny-llama")
NAME = "tale"
HEIR = "heir"
KEPT = (".usage", ".encrypted")
KEY = "5c" * 32
OPERATIONS = (
    ("append", 190),
    ("generate", 7),
    ("append", 61),
    ("fork", 0),
    ("generate", 5),
    ("undo", 0),
    ("append", 83),
    ("align", 30),
    ("generate", 9),
    ("append", 21),
    ("fork", 0),
    ("undo", 0),
    ("heir", 0),
    ("generate", 11),
)


def config(folder: Path) -> Config:
    return Config(select_tokens=56, recent_tokens=16, kv_memory="4MiB", kv_dir=str(folder / "kv"))


def apply(session: Session, number: int) -> None:
    name, size = OPERATIONS[number]
    if name == "append":
        session.append(tokens(1, size, seed=number)[0].tolist())
    elif name == "generate":
        list(session.generate(max_new_tokens=size))
    elif name == "undo":
        session.undo()
    elif name == "align":
        ids = [*session.token_ids[:-size], *tokens(1, 5, seed=number)[0].tolist()]
        session.truncate(session.common_tokens(ids))
        session.append(ids[len(session.token_ids) :])
    elif name == "heir":  # takes over from a fork, which is closed
        encrypt = session.store.manifest.encryption is not None
        try:
            with Session.create(HEIR, MODEL, session.config, encrypt=encrypt) as heir:
                assert heir.share_prefix([*session.token_ids, 1]) in ("fork-3", "fork-10")
        except SessionError as error:
            assert "exists already" in str(error)
    elif name == "fork":
        try:
            session.fork(f"fork-{number}")
        except SessionError as error:  # from before the kill
            assert "exists already" in str(error)


def reference(folder: Path, *, encrypt: bool = False) -> tuple[list[list[int]], float]:
    """Token ids before the first and after every operation, and the seconds it all took."""
    started_s = time.perf_counter()
    with Session.create(NAME, MODEL, config(folder), encrypt=encrypt) as session:
        states = [session.token_ids]
        for number in range(len(OPERATIONS)):
            apply(session, number)
            states.append(session.token_ids)
    return states, time.perf_counter() - started_s


def run(folder: Path, home: Path, encrypt: bool, ready: Connection) -> None:
    """The whole schedule on a new session, until somebody kills this process."""
    os.environ |= {"XDG_CACHE_HOME": str(home), KEY_VARIABLE: KEY}
    ready.send("ready")
    reference(folder, encrypt=encrypt)


def recover(folder: Path, home: Path, states: list[list[int]], report: Connection) -> None:
    """What is there after the kill; sends the operation that was reached, or what is wrong, as text."""
    os.environ |= {"XDG_CACHE_HOME": str(home), KEY_VARIABLE: KEY}
    try:
        report.send(_recover(folder, states))
    except BaseException as error:
        report.send(f"{type(error).__name__}: {error}")
        raise


def _recover(folder: Path, states: list[list[int]]) -> int | str:
    if not os.path.lexists(session_path(config(folder).kv_dir, NAME)):
        return 0  # killed before there was a session
    with Session.open(NAME, MODEL, config(folder)) as session:
        found = session.token_ids
        reached = max((n for n, ids in enumerate(states) if ids == found), default=None)
        if reached is None:
            return f"{len(found)} tokens are no committed state"
        if problems := check(session.store).problems:
            return f"check: {problems}"
        for number in range(reached, len(OPERATIONS)):
            apply(session, number)
            if session.token_ids != states[number + 1]:
                return f"wrong tokens after operation {number}, resumed at {reached}"
    root = session_path(config(folder).kv_dir, NAME).parent
    prune(root)
    for entry in entries(root):
        if entry.manifest is None:
            return f"{entry.name}: {entry.problem}"
        names = set(os.listdir(entry.path)) - {"manifest", "lock"}
        if names != set(entry.manifest.files()):
            return f"{entry.name}: leaked {names ^ set(entry.manifest.files())}"
    leaked = [name for name in os.listdir(root) if name.startswith(".") and name not in KEPT]
    return f"leaked {leaked}" if leaked else reached
