"""Law 7 for stored contexts: whatever call of the system fails, a session has its old state or the new one.

Every operation on sessions is run once to see which calls it makes, from which lines. Then it is run again for each of
them with that call failing: for good, as on a file system that cannot do it, or once, as a disk fails. The calls are
those that the code itself names, so none can be forgotten. Each failure is an error of ours that says what to do; it
leaves nothing behind, and with a healthy system every session opens in the state before or after. That is decided by
all that is stored, since equal K, V, ids and sketches give the same next tokens; test_every_disk_failure and
test_failed_changes have the same law with a model.
"""

from __future__ import annotations

import ast
import errno
import fcntl
import functools
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvswap
from kvswap.disk.files import ensure_size, open_unlinked, prepare_dir
from kvswap.errors import KVSwapError
from kvswap.sessions import catalog, sharing
from kvswap.sessions.check import check, quarantined, remove_quarantined, repair_session
from kvswap.sessions.commits import SessionStore
from kvswap.sessions.encryption import KEY_VARIABLE
from kvswap.sessions.export_import import export_session, import_session
from kvswap.sessions.quota import Limits, Quota
from tests.helpers.stored_groups import damage_group
from tests.sessions.test_fuzz import commit_groups, content, make

SOURCE = Path(kvswap.__file__).parent
NO_CALLS = {"close", "fspath", "geteuid", "getpid", "strerror", "walk"}
"""What the code names of ``os`` that asks the system for nothing, or that cannot fail in a way to be told."""
UNDER_PATHLIB = {"listdir", "lstat", "mkdir", "rmdir", "scandir", "stat", "unlink"}
CANNOT = (errno.ENOTSUP, errno.ENOSYS, errno.EPERM, errno.ENOLCK, errno.EINVAL)
FAILS = (errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EACCES)
PART = 6
"""One call in so many is tried by default."""
Site = tuple[str, tuple[str, ...]]


def calls() -> set[str]:
    """Functions of ``os`` that the rooms of files and of sessions call."""
    found = set(UNDER_PATHLIB)
    for file in [*SOURCE.glob("disk/*.py"), *SOURCE.glob("sessions/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                if isinstance(owner, ast.Name) and owner.id == "os":
                    found.add(node.func.attr)
    return found - NO_CALLS


class System:
    """Stands in for calls of the system: notes from which lines they are made, and fails those of one place."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sites: set[Site] = set()
        self.target: Site | None = None
        self.error: BaseException = OSError()
        self.once = self.late = self.failed = False
        for name in calls():
            patch.setattr(os, name, self._stand_in(name, getattr(os, name)))
        patch.setattr(fcntl, "flock", self._stand_in("flock", fcntl.flock))

    def _stand_in(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def call(*args: Any, **kwargs: Any) -> Any:
            site = (name, _lines())
            self.sites.add(site)
            if not site[1] or site != self.target or (self.failed and self.once):
                return real(*args, **kwargs)
            self.failed = True
            if self.late:
                real(*args, **kwargs)
            raise self.error

        return call


def _lines() -> tuple[str, ...]:
    """The innermost lines of kvswap that lead to a call; none where it has not to do with kvswap."""
    found: list[str] = []
    frame: Any = sys._getframe(2)
    for _ in range(12):
        if frame is None or len(found) == 3:
            break
        file = frame.f_code.co_filename
        if file.startswith(str(SOURCE)):
            found.append(f"{Path(file).name}:{frame.f_lineno}")
        frame = frame.f_back
    return tuple(found)


# ---- operations


def write(root: Path) -> SessionStore:
    return SessionStore.open(root / "base", write=True)


def create(root: Path) -> None:
    catalog.create_store(str(root.parent), "new").close()


def load(root: Path) -> None:
    with write(root) as store:
        store.load()
        store.basis()


def commit(root: Path) -> None:
    with write(root) as store:
        commit_groups(store, np.random.default_rng(7), 8, 4)


def commit_text(root: Path) -> None:
    with write(root) as store:
        contents = store.load()
        assert contents is not None
        store.commit_text(contents.ids, b'["other words"]', interim=True)


def undo(root: Path) -> None:
    with write(root) as store:
        store.undo()


def truncate(root: Path) -> None:
    with write(root) as store:
        store.truncate(12)
        commit_groups(store, np.random.default_rng(8), 3, 2)


def look(root: Path) -> None:
    catalog.entries(root)
    catalog.used_bytes(root)
    catalog.freed_by_removal([root / "base"])


def examine(root: Path) -> None:
    with SessionStore.open(root / "base", write=False) as store:
        report = check(store)
    if report.problems:
        raise KVSwapError(report.problems[0], hint="a check reports, and this was one")


def fork(root: Path) -> None:
    with write(root) as store:
        sharing.fork(store, root / "forked")


def share(root: Path) -> None:
    shutil.rmtree(root / "broken", ignore_errors=True)  # whatever is shared is checked when it is read
    with SessionStore.create(root / "heir") as store:
        sharing.share_prefix(store, list(range(30)), lambda manifest: True)


def export(root: Path) -> None:
    with write(root) as store:
        export_session(store, root.parent / "exported")


def import_(root: Path) -> None:
    import_session(root.parent / "archive", root / "imported")


def remove(root: Path) -> None:
    catalog.remove(root / "base")


def wipe(root: Path) -> None:
    catalog.remove(root / "base", wipe=True)


def prune(root: Path) -> None:
    catalog.prune(root)


def repair(root: Path) -> None:
    repair_session(root / "broken")
    assert quarantined(root)
    remove_quarantined(root)


def make_room(root: Path) -> None:
    limits = Limits(quota_bytes=catalog.used_bytes(root) - 5000, write_bytes=1 << 30)
    Quota(root / "new", limits, lambda words: None).reserve(1)


def temporary(root: Path) -> None:
    fd = open_unlinked(prepare_dir(root.parent), 4096, direct=False)
    try:
        ensure_size(fd, 9000)
    finally:
        os.close(fd)


CHANGES = (create, load, commit, commit_text, undo, truncate, fork, share, import_, remove, wipe, prune, repair)
OPERATIONS = (*CHANGES, look, examine, export, make_room, temporary)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "5c" * 32)
    monkeypatch.setattr(sharing, "MIN_SHARED_TOKENS", 1)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for KV files with sessions, an archive and a leftover in it."""
    kv = tmp_path_factory.mktemp("template") / "kv"
    root = kv / "sessions"
    root.mkdir(parents=True)
    make(root / "base", encrypt=False)
    make(root / "broken", encrypt=False)
    with SessionStore.open(root / "base", write=True) as store:
        export_session(store, kv / "archive")
    damage_group(root / "broken", 1)
    shutil.copytree(root / "base", root / ".new-left")
    return kv


def copied(template: Path, folder: Path) -> Path:
    shutil.copytree(template, folder / "kv")
    for path in (folder / "kv" / "sessions").iterdir():
        path.chmod(0o700)
    return folder / "kv" / "sessions"


def state(root: Path) -> Any:
    """All that the session ``base`` stores; None where it is gone. A session that is half wiped has nothing more."""
    path = root / "base"
    if not path.exists():
        return None
    try:
        return content(path)[:4]
    except KVSwapError as error:
        if "sessions wipe base finishes it" not in str(error):
            raise
        catalog.remove(path, wipe=True)
        return None


def survey(operation: Callable[[Path], None], root: Path) -> list[Site]:
    with pytest.MonkeyPatch.context() as patch:
        system = System(patch)
        operation(root)
    return sorted(site for site in system.sites if site[1])


def fail(operation: Callable[[Path], None], root: Path, site: Site, error: BaseException, **how: bool) -> Any:
    """What the operation raised, if anything, with one call failing."""
    before = os.listdir("/proc/self/fd")
    with pytest.MonkeyPatch.context() as patch:
        system = System(patch)
        system.target, system.error = site, error
        system.once, system.late = how.get("once", False), how.get("late", False)
        try:
            operation(root)
        except (Exception, KeyboardInterrupt) as raised:  # noqa: BLE001 - judged by the caller
            found: BaseException | None = raised.with_traceback(None)
            raised.__context__ = raised.__cause__ = None
        else:
            found = None
        assert system.failed, f"{site} was not reached again"
    assert os.listdir("/proc/self/fd") == before, (site, error)
    return found


def ways(site: Site) -> Iterator[tuple[BaseException, dict[str, bool]]]:
    yield from ((OSError(code, os.strerror(code)), {}) for code in CANNOT)
    yield from ((OSError(code, os.strerror(code)), {"once": True}) for code in FAILS)
    yield KeyboardInterrupt(), {"once": True}
    if site[0] not in ("open", "dup", "scandir"):  # what they opened would be lost here
        yield KeyboardInterrupt(), {"once": True, "late": True}


def sweep(operation: Callable[[Path], None], template: Path, folder: Path, *, every_way: bool) -> tuple[int, int]:
    """How many failures were tried, and how many of them ended the operation."""
    reference = copied(template, folder / "reference")
    before = state(reference)
    found = survey(operation, reference)
    after = state(reference)
    tried = ended = 0
    for number, site in enumerate(found):
        possible = list(ways(site))
        chosen = possible if every_way else [possible[number // PART % len(possible)]]
        if number % PART and not every_way:
            continue
        for way, (error, how) in enumerate(chosen):
            what = (operation.__name__, site, error, how)
            place = folder / f"{number}-{way}"
            root = copied(template, place)
            raised = fail(operation, root, site, error, **how)
            tried, ended = tried + 1, ended + (raised is not None)
            judge(raised, error, what)
            assert state(root) in (before, after), what
            whole(root, what)
            shutil.rmtree(place)
    return tried, ended


def judge(raised: BaseException | None, error: BaseException, what: Any) -> None:
    """An error of ours, with what to do, that does not take one fault for another."""
    if raised is None or (isinstance(raised, KeyboardInterrupt) and isinstance(error, KeyboardInterrupt)):
        return
    assert isinstance(raised, KVSwapError), (what, raised)
    assert raised.hint and raised.message and "\n" not in str(raised), (what, raised)
    assert "in use by" not in str(raised), (what, raised)
    name, code = what[1][0], error.errno if isinstance(error, OSError) else 0
    # A session that cannot be locked is not evicted; nobody could have opened the one that needs the room either.
    if name == "flock" and code in CANNOT and code != errno.EPERM and what[0] != "make_room":
        assert re.search("has no locks.*mount it with locks, or choose another folder", str(raised)), (what, raised)
    if code == errno.EMFILE and name == "open":
        assert "ulimit -n" in str(raised) or "there is no session" in str(raised), (what, raised)


def whole(root: Path, what: Any) -> None:
    """Every session that has a name is sound, and nothing is left that prune does not find."""
    for entry in catalog.entries(root):
        assert entry.manifest is not None, (what, entry)
        assert not entry.in_use, what
        if entry.name != "broken":
            with SessionStore.open(entry.path, write=True) as store:
                assert check(store).problems == [], what
    catalog.prune(root)
    left = [path.name for path in root.iterdir() if path.name.startswith(".")]
    assert set(left) <= {".usage", ".damaged", ".encrypted"}, what
    left = [path.name for path in root.parent.iterdir()]
    assert set(left) <= {"sessions", "archive", "exported"}, (what, left)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_call_fails_in_some_way(operation: Callable[[Path], None], template: Path, tmp_path: Path) -> None:
    tried, ended = sweep(operation, template, tmp_path, every_way=False)
    assert tried > 0
    assert ended > 0 or operation is look  # a list goes on where one session cannot be read


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_call_fails_in_every_way(operation: Callable[[Path], None], template: Path, tmp_path: Path) -> None:
    assert sweep(operation, template, tmp_path, every_way=True)[1] > 10
