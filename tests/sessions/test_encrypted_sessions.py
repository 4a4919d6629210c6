"""Encrypted sessions: the same tokens, nothing readable on disk, no use without the key, no nonce twice."""

from __future__ import annotations

import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvswap.config import Config
from kvswap.errors import DamagedError, KVSwapError, SessionError
from kvswap.sessions import encrypted_names, encryption
from kvswap.sessions.catalog import (
    create_store,
    entry,
    open_or_create_store,
    open_store,
    prune,
    remove,
    session_path,
)
from kvswap.sessions.check import check, repair_session
from kvswap.sessions.encryption import KEY_VARIABLE
from kvswap.sessions.export_import import export_session, import_session
from kvswap.sessions.seal import text_sum
from kvswap.sessions.session import Session
from kvswap.sessions.sharing import fork
from tests.helpers.families import tokens
from tests.helpers.stored_groups import place_of_group
from tests.laws.test_resume import FAMILIES, OPERATIONS, loaded, play

KEY = "5c" * 32
PROMPT = tokens(1, 301)[0].tolist()


@pytest.fixture(autouse=True)
def environment(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv(KEY_VARIABLE, KEY)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(select_tokens=56, recent_tokens=16, sink_tokens=4, kv_memory="4MiB", kv_dir=str(tmp_path / "kv"))


@pytest.fixture
def secret(config: Config) -> Path:
    """An encrypted session of two commits; its folder."""
    with Session.create("secret", loaded("llama"), config, encrypt=True) as session:
        session.append(PROMPT)
        session.commit(session.token_ids, b'["my secret words"]')
        list(session.generate(max_new_tokens=40))
        return session.store.folder.path


SCHEDULE = [
    ("append", 61, True),
    ("generate", 13, False),
    ("fork", 1, True),
    ("undo", 0, True),
    ("append", 90, False),
    ("align", 40, True),
    ("generate", 9, True),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_as_without_encryption(family, tmp_path) -> None:
    plain = play(family, SCHEDULE, tmp_path / "plain", reopen=False)
    assert play(family, SCHEDULE, tmp_path / "secret", reopen=True, encrypt=True) == plain


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_as_without_encryption_in_many_schedules(family, tmp_path_factory) -> None:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    @settings(max_examples=30, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(OPERATIONS, min_size=2, max_size=9))
    def run(schedule: list[tuple[str, int, bool]]) -> None:
        folder = tmp_path_factory.mktemp("law")
        plain = play(family, schedule, folder / "plain", reopen=False)
        assert play(family, schedule, folder / "secret", reopen=True, encrypt=True) == plain

    run()


def test_no_key_meets_a_nonce_twice(tmp_path, monkeypatch, config) -> None:
    """Also where the same groups are written again: after undo, cut, a lost commit, in a fork and after an import."""
    met: set[tuple[bytes, bytes]] = set()
    real = encryption._aes

    class Recorder:
        def __init__(self, key: bytes) -> None:
            self.key, self.real = key, real(key)

        def note(self, nonce: bytes) -> None:
            assert (self.key, bytes(nonce)) not in met
            met.add((self.key, bytes(nonce)))

        def encrypt(self, nonce: bytes, *rest: Any) -> bytes:
            self.note(nonce)
            return self.real.encrypt(nonce, *rest)

        def encrypt_into(self, nonce: bytes, *rest: Any) -> int:
            self.note(nonce)
            return self.real.encrypt_into(nonce, *rest)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

    monkeypatch.setattr(encryption, "_aes", Recorder)
    play("llama", SCHEDULE, tmp_path / "kv", reopen=True, encrypt=True)
    with Session.create("one", loaded("llama"), config, encrypt=True) as session:
        session.append(PROMPT)
        session.fork("two")
        session._forward(tokens(1, 80)[0].tolist())  # written and never committed
        session.rollback()
        session.append(tokens(1, 80, seed=2)[0].tolist())
        session.undo()
        session.append(tokens(1, 80, seed=3)[0].tolist())
    before = len(met)
    with Session.open("two", loaded("llama"), config) as session:
        session.append(tokens(1, 80, seed=2)[0].tolist())
        archive = tmp_path / "two.kvswap"
        export_session(session.store, archive)
    path = tmp_path / "kv" / "sessions" / "three"
    import_session(archive, path)
    with Session.open("three", loaded("llama"), config) as session:
        session.append(tokens(1, 80, seed=3)[0].tolist())
    assert len(met) > before + 50 > 500


def test_nothing_is_readable_on_disk(secret, config) -> None:
    with Session.create("plain", loaded("llama"), config) as session:
        session.append(PROMPT)
        session.commit(session.token_ids, b'["my secret words"]')
        list(session.generate(max_new_tokens=40))
        plain = session.store.folder.path
    ids = np.array(PROMPT, np.int64).tobytes()
    for folder, found in ((plain, True), (secret, False)):
        data = b"".join(file.read_bytes() for file in sorted(folder.iterdir()))
        assert (ids in data) == (b"secret words" in data) == found
    for name in ("basis", "data-0", "index-0"):  # compresses: not random
        sizes = [len(zlib.compress((folder / name).read_bytes())) for folder in (plain, secret)]
        assert sizes[0] < 0.97 * sizes[1], name
    same = [file.name for file in plain.iterdir() if file.name.startswith("data-")]
    assert all((plain / name).stat().st_size == (secret / name).stat().st_size for name in same) and same


@pytest.mark.parametrize(
    ("key", "message"),
    [(None, "is encrypted and there is no key"), ("6d" * 32, "is encrypted with another key"), ("6d", "is no key")],
)
def test_without_its_key_a_session_is_listed_and_removed_and_nothing_else(
    key, message, secret, config, monkeypatch
) -> None:
    import keyring

    monkeypatch.setattr(keyring, "get_password", lambda service, name: None)
    before = {file.name: file.read_bytes() for file in secret.iterdir() if file.name != "lock"}
    monkeypatch.delenv(KEY_VARIABLE) if key is None else monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(SessionError, match=message):
        Session.open("secret", loaded("llama"), config)
    with open_store(config.kv_dir, "secret") as store, pytest.raises(SessionError, match=message):
        fork(store, secret.with_name("fork"))
    with open_store(config.kv_dir, "secret", write=False) as store, pytest.raises(SessionError, match=message):
        check(store)
    shown = entry(secret)
    assert shown.manifest is not None and shown.manifest.encryption is not None and not shown.problem
    prune(secret.parent)
    assert {file.name: file.read_bytes() for file in secret.iterdir() if file.name != "lock"} == before
    assert sorted(path.name for path in secret.parent.iterdir() if path.is_dir()) == [".encrypted", "secret"]


def goes_on(config: Config) -> None:
    with Session.open("secret", loaded("llama"), config) as session:
        session.append(tokens(1, 30, seed=5)[0].tolist())
        list(session.generate(max_new_tokens=4))


def exchange(one: tuple[Path, int, int], two: tuple[Path, int, int]) -> None:
    """Put two groups of a file into each other's place."""
    (file, first, size), (same, second, _) = one, two
    data = bytearray(file.read_bytes())
    assert file == same and first != second
    data[first : first + size], data[second : second + size] = data[second : second + size], data[first : first + size]
    file.write_bytes(data)


def swap_groups(folder: Path) -> None:
    exchange(place_of_group(folder, 1, 0.3), place_of_group(folder, 1, 0.4))


def swap_layers(folder: Path) -> None:
    for share in (0, 0.3, 0.4):
        exchange(place_of_group(folder, 0, share), place_of_group(folder, 1, share))


def forge_manifest(folder: Path) -> None:
    """Other facts under the right checksum: what encryption adds is that this is noticed."""
    head, _, body = (folder / "manifest").read_bytes().partition(b"\n")
    body = body.replace(b'"written_bytes": ', b'"written_bytes": 1')
    words = head.decode().split(" ")
    (folder / "manifest").write_bytes(" ".join([*words[:2], text_sum(body), words[3]]).encode() + b"\n" + body)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_groups, r"group \d+ of layer 1 is not what was written"),
        (swap_layers, r"group \d+ of layer 0 is not what was written"),
        (forge_manifest, "its manifest is not authentic"),
    ],
)
def test_somebody_elses_changes_are_found(change, message, secret, config) -> None:
    change(secret)
    with pytest.raises(DamagedError, match=message):
        goes_on(config)
    with open_store(config.kv_dir, "secret", write=False) as store:
        try:
            assert check(store).problems
        except DamagedError as error:
            assert "not authentic" in str(error)


@pytest.mark.parametrize("name", ["basis", "index-0", "data-0"])
def test_files_of_another_session_are_refused(name, secret, config) -> None:
    """Of the same length, under the same master key."""
    with Session.create("second", loaded("llama"), config, encrypt=True) as session:
        session.append(PROMPT)
        session.commit(session.token_ids, b'["my secret words"]')
        list(session.generate(max_new_tokens=40))
    other = secret.with_name("second") / name
    assert other.stat().st_size == (secret / name).stat().st_size
    shutil.copyfile(other, secret / name)
    with pytest.raises(DamagedError):
        goes_on(config)


def test_encryption_does_not_depend_on_verification(secret, config) -> None:
    """Groups are decrypted, hence authenticated, whatever --no-verify says."""
    with Session.open("secret", loaded("llama"), config, verify=False) as session:
        session.append(tokens(1, 30, seed=5)[0].tolist())
        kept = session.token_ids
    swap_groups(secret)
    with pytest.raises(DamagedError), Session.open("secret", loaded("llama"), config, verify=False) as session:
        assert session.token_ids == kept
        session.append([1, 2, 3])


def test_export_import_and_repair_stay_encrypted(secret, config, tmp_path) -> None:
    with open_store(config.kv_dir, "secret") as store:
        export_session(store, tmp_path / "secret.kvswap")
    assert b"secret words" not in (tmp_path / "secret.kvswap").read_bytes()
    import_session(tmp_path / "secret.kvswap", secret.with_name("again"))
    answers = []
    for name in ("secret", "again"):
        with Session.open(name, loaded("llama"), config) as session:
            assert session.conversation == b'["my secret words"]'
            answers.append("".join(session.generate(max_new_tokens=9)))
    assert answers[0] == answers[1]
    swap_groups(secret)
    words, place = repair_session(secret)
    assert "tokens are kept" in words and place is not None
    goes_on(config)


def test_forged_manifest_is_quarantined_by_repair(secret, config) -> None:
    forge_manifest(secret)
    with pytest.raises(DamagedError, match=r"not authentic.*it was moved to"):
        repair_session(secret)
    assert not secret.exists() and list((secret.parent / ".damaged").iterdir())


def test_archive_needs_the_key(secret, config, tmp_path, monkeypatch) -> None:
    with open_store(config.kv_dir, "secret") as store:
        export_session(store, tmp_path / "secret.kvswap")
    monkeypatch.setenv(KEY_VARIABLE, "6d" * 32)
    with pytest.raises(KVSwapError, match="another key"):
        import_session(tmp_path / "secret.kvswap", secret.with_name("again"))
    assert not os.path.lexists(secret.with_name("again"))


# ---- another session in an encrypted one's place


def put_plain(config: Config, path: Path) -> None:
    """A plain session under the name of an encrypted one, as a mistake with a backup would leave it."""
    with Session.create("plain", loaded("llama"), config) as session:
        session.append(PROMPT)
    shutil.rmtree(path)
    os.rename(path.with_name("plain"), path)


def fork_it(config: Config) -> None:
    with open_store(config.kv_dir, "secret") as store:
        fork(store, session_path(config.kv_dir, "fork"))


@pytest.mark.parametrize("use", [goes_on, fork_it, lambda config: open_or_create_store(config.kv_dir, "secret")])
def test_a_plain_session_in_an_encrypted_ones_place_is_not_written_to(use, secret, config) -> None:
    put_plain(config, secret)
    before = {file.name: file.read_bytes() for file in secret.iterdir() if file.name != "lock"}
    with pytest.raises(SessionError, match=r"session secret was encrypted.*rm secret"):
        use(config)
    assert {file.name: file.read_bytes() for file in secret.iterdir() if file.name != "lock"} == before
    assert entry(secret).manifest is not None  # it can be looked at and removed
    remove(secret)
    open_or_create_store(config.kv_dir, "secret").close()


def test_a_name_that_was_encrypted_is_not_used_for_a_plain_session(secret, config, tmp_path) -> None:
    """After the folder was deleted by hand, and after an eviction: create, fork, import, run --session."""
    with Session.create("plain", loaded("llama"), config) as session:
        session.append(PROMPT)
        archive = tmp_path / "plain.kvswap"
        export_session(session.store, archive)
    remove(secret, forget=False)
    with open_store(config.kv_dir, "plain") as plain:
        for use in (
            lambda: create_store(config.kv_dir, "secret"),
            lambda: open_or_create_store(config.kv_dir, "secret"),
            lambda: fork(plain, secret),
            lambda: import_session(archive, secret),
        ):
            with pytest.raises(SessionError, match="session secret was encrypted"):
                use()
            assert not secret.exists()
    open_or_create_store(config.kv_dir, "secret", encrypt=True).close(discard_empty=True)
    create_store(config.kv_dir, "secret").close()
    remove(secret)
    with pytest.raises(SessionError, match="there is no session secret"):
        remove(secret)


def test_an_encrypted_session_with_another_key_in_its_place_is_not_written_to(secret, config, monkeypatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "6d" * 32)
    with Session.create("other", loaded("llama"), config, encrypt=True) as session:
        session.append(PROMPT)
    shutil.rmtree(secret)
    os.rename(secret.with_name("other"), secret)
    before = {file.name: file.read_bytes() for file in secret.iterdir() if file.name != "lock"}
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    for use in (goes_on, fork_it):
        with pytest.raises(SessionError, match="is encrypted with another key"):
            use(config)
    assert {file.name: file.read_bytes() for file in secret.iterdir() if file.name != "lock"} == before


def test_an_open_session_goes_on_in_its_own_folder_when_another_takes_its_place(secret, config) -> None:
    with Session.open("secret", loaded("llama"), config) as session:
        os.rename(secret, secret.with_name("moved"))
        with Session.create("plain", loaded("llama"), config) as plain:
            plain.append(PROMPT)
        os.rename(secret.with_name("plain"), secret)
        before = {file.name: file.read_bytes() for file in secret.iterdir() if file.name != "lock"}
        session.append(tokens(1, 30, seed=5)[0].tolist())
        kept = session.token_ids
        session.rollback()
        assert session.token_ids == kept
    assert {file.name: file.read_bytes() for file in secret.iterdir() if file.name != "lock"} == before
    with Session.open("moved", loaded("llama"), config) as session:
        assert session.token_ids == kept and check(session.store).problems == []


def test_a_source_that_is_replaced_after_it_was_found_is_not_shared(secret, config, monkeypatch) -> None:
    """Neither a plain one, which would make the new session plain, nor one with other tokens."""
    from kvswap.sessions import sharing

    with Session.create("heir", loaded("llama"), config, encrypt=True) as heir:
        real = sharing.find_prefix

        def find(*words: Any) -> Any:
            found = real(*words)
            assert [path.name for _, path in found] == ["secret"]
            put_plain(config, secret)
            encrypted_names.forget(secret)
            return found

        monkeypatch.setattr(sharing, "find_prefix", find)
        assert heir.share_prefix([*PROMPT, 1]) is None
        assert heir.store.manifest.encryption is not None and heir.token_ids == []
