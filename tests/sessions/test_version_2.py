"""Sessions of format version 2, with one data file a layer, as an earlier kvswap wrote them: a fork with two segments.

They are read, continued, cut, shared, exported and imported. Groups that are there stay in their files; new ones go
into files of today.
"""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvswap.config import Config
from kvswap.models.loading import LoadedModel
from kvswap.sessions.binding import identify
from kvswap.sessions.catalog import open_store, session_path
from kvswap.sessions.check import check
from kvswap.sessions.commits import SessionStore
from kvswap.sessions.encryption import KEY_VARIABLE
from kvswap.sessions.export_import import export_session, import_session
from kvswap.sessions.manifest_json import encode
from kvswap.sessions.session import Session
from tests.helpers.families import tiny_model, tokens
from tests.helpers.folders import byte_tokenizer
from tests.helpers.version_2 import as_version_2, make_version_2

pytestmark = pytest.mark.usefixtures("cache_home")
FOLDER = Path(__file__).parent
GROUP_SUM = 1300416  # of all bytes of the groups, as they were written
LAST_IDS = [110, 45, 41]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    """A model of the shape that the sessions were made with."""
    model = tiny_model("llama", vocab_size=300, num_hidden_layers=2, num_key_value_heads=1)
    return LoadedModel(model, byte_tokenizer(), "tiny-llama")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(select_tokens=24, recent_tokens=8, sink_tokens=4, kv_memory="4MiB", kv_dir=str(tmp_path / "kv"))


@pytest.fixture(params=["session-v2.tar.gz", "session-v2-encrypted.tar.gz"])
def old(request, config, model, monkeypatch) -> Path:
    """The session on disk."""
    monkeypatch.setenv(KEY_VARIABLE, "5c" * 32)
    path = session_path(config.kv_dir, "old")
    path.parent.mkdir(parents=True)
    path.mkdir(mode=0o700)
    with tarfile.open(FOLDER / request.param) as archive:
        for member in archive.getmembers():
            (path / member.name).write_bytes(archive.extractfile(member).read())
            (path / member.name).chmod(0o600)
    assert (path / "manifest").read_bytes().startswith(b"kvswap-session 2 ")
    return path


def adopt(path: Path, model: LoadedModel) -> None:
    """Say that the session's model is ours, whatever random weights this version of torch gives it."""
    with SessionStore.open(path, write=True) as store:
        sign, manifest = store.sealer.sign, replace(store.manifest, model=identify(model))
        store.folder.replace("manifest", as_version_2(encode(manifest, sign), sign))


def contents(path: Path) -> list[bytes]:
    """All groups of the newest context, decrypted, layer by layer."""
    found = []
    with SessionStore.open(path, write=False) as store:
        layout, stored = store.manifest.layout, store.load()
        for layer, index in enumerate(stored.groups):
            for segment, ends in store.manifest.ends(store.manifest.current):
                for run in segment.runs(layout, layer, segment.start[layer], ends[layer], 1 << 20):
                    size = run.count * layout.slot_bytes
                    data = store.folder.read(run.file, size, offset_bytes=run.offset_bytes)
                    slots = np.frombuffer(data, np.uint8).reshape(run.count, -1)[:, : layout.geometry.group_bytes]
                    slots, groups = slots.copy(), np.arange(run.first, run.first + run.count)
                    assert store.sealer.unseal(np.full(run.count, layer), groups, slots, index.seals[groups]).all()
                    found.append(slots.tobytes())
    return found


def test_it_is_read_as_it_was_written(old) -> None:
    with SessionStore.open(old, write=False) as store:
        stored = store.load()
        assert stored.tokens == 89 and stored.ids[-3:] == LAST_IDS and stored.conversation == b'["hello"]'
        assert [(s.number, s.owned, s.start, s.high) for s in store.manifest.segments] == [
            (0, False, (0, 0), (14, 14)),
            (1, True, (14, 14), (22, 22)),
        ]
        assert check(store).problems == [] and check(store).groups == 44
    numbers = np.frombuffer(b"".join(contents(old)), np.uint8)
    assert (len(numbers), int(numbers.astype(np.int64).sum())) == (44 * 256, GROUP_SUM)


def test_it_is_continued_in_a_new_file_and_taken_back(old, model, config) -> None:
    adopt(old, model)
    before = {file.name: file.read_bytes() for file in old.glob("data-*")}
    with Session.open("old", model, config) as session:
        session.append(tokens(1, 40, seed=3)[0].tolist())
        list(session.generate(max_new_tokens=9))
        assert check(session.store).problems == []
        assert [segment.names()[0] for segment in session.store.manifest.segments] == ["data-0-0", "data-1-0", "data-2"]
        kept = session.token_ids
    assert (old / "manifest").read_bytes().startswith(b"kvswap-session 3 ")
    with Session.open("old", model, config) as session:
        assert session.token_ids == kept
        session.truncate(70)
        session.append(tokens(1, 30, seed=4)[0].tolist())
        assert check(session.store).problems == []
        for _ in range(3):
            session.undo()
        assert session.token_ids[-3:] == LAST_IDS and check(session.store).problems == []
    assert {file.name: file.read_bytes() for file in old.glob("data-*")} == before


def test_its_files_are_shared_and_exported_as_today(old, model, config, tmp_path) -> None:
    adopt(old, model)
    with Session.open("old", model, config) as session:
        session.fork("fork")
        export_session(session.store, tmp_path / "one.kvswap")
    import_session(tmp_path / "one.kvswap", old.with_name("imported"))
    assert os.stat(old / "data-0-0").st_nlink == 2
    with tarfile.open(tmp_path / "one.kvswap") as archive:
        assert archive.getnames() == ["manifest", "basis", "tail-0", "index-0", "data-0"]
    answers, written = [], b"".join(contents(old))
    for name in ("old", "fork", "imported"):
        assert b"".join(contents(old.with_name(name))) == written
        with Session.open(name, model, config) as session:
            session.append(tokens(1, 40, seed=3)[0].tolist())
            list(session.generate(max_new_tokens=9))
            answers.append(session.token_ids)
            assert check(session.store).problems == []
    assert answers == answers[:1] * 3


def test_its_archive_is_imported_and_continued(tmp_path, model, config) -> None:
    path = session_path(config.kv_dir, "new")
    path.parent.mkdir(parents=True)
    import_session(FOLDER / "session-v2.kvswap", path)
    assert (path / "manifest").read_bytes().startswith(b"kvswap-session 3 ")
    with open_store(config.kv_dir, "new") as store:
        assert store.load().tokens == 89 and store.load().ids[-3:] == LAST_IDS and check(store).problems == []
        export_session(store, tmp_path / "again.kvswap")
    import_session(tmp_path / "again.kvswap", path.with_name("again"))
    assert b"".join(contents(path.with_name("again"))) == b"".join(contents(path))


def test_what_makes_version_2_for_other_tests_makes_the_same(old, tmp_path) -> None:
    """Exported and imported it is one of today; made old again it has the bytes that version 2 wrote."""
    with SessionStore.open(old, write=False) as store:
        export_session(store, tmp_path / "one.kvswap")
    import_session(tmp_path / "one.kvswap", old.with_name("new"))
    make_version_2(old.with_name("new"))
    for layer in range(2):
        written = b"".join((old / f"data-{segment}-{layer}").read_bytes() for segment in range(2))
        assert (old.with_name("new") / f"data-0-{layer}").read_bytes() == written
    heads, bodies = zip(
        *(((path / "manifest").read_bytes()).split(b"\n", 1) for path in (old, old.with_name("new"))), strict=True
    )
    assert all(head.startswith(b"kvswap-session 2 ") for head in heads)
    written, made = (places(json.loads(body)) for body in bodies)
    assert {place for place in written if not place.startswith(".rates.")} == made  # an export has no rates


def places(value: Any, at: str = "") -> set[str]:
    """Names of all keys of a JSON value, with those around them."""
    if isinstance(value, list):
        return {place for each in value for place in places(each, at)}
    return (
        {at, *(p for key, each in value.items() for p in places(each, f"{at}.{key}"))}
        if isinstance(value, dict)
        else {at}
    )
