"""``kvswap sessions``: list, check, repair, fork, move, remove; and what ``run`` says about a damaged session."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import stat
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from kvswap.sessions.catalog import open_store
from tests.helpers.stored_groups import damage_group, place_of_group

pytestmark = pytest.mark.usefixtures("cache_home")


def facts(sessions, name: str) -> dict:
    code, out, _ = sessions("show", name)
    assert code == 0
    return json.loads(out)


def damage(path: Path, place: float = 0.6) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)


def test_list_show_and_modes(tale, sessions) -> None:
    code, out, _ = sessions("list")
    assert code == 0 and "tale" in out and "tokens" in out
    shown = facts(sessions, "tale")
    assert shown["tokens"] > 900 and shown["written_bytes"] > shown["tokens"] * 3 * 2 * 2 * 16 * 2
    assert json.loads(sessions("list", "--json")[1]) == [shown]
    assert stat.S_IMODE(tale.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in tale.iterdir()} == {0o600}


def test_modes_do_not_depend_on_the_umask(ask, kv_dir) -> None:
    old = os.umask(0)
    try:
        assert ask("Who?")[0] == 0
    finally:
        os.umask(old)
    folder = kv_dir / "sessions" / "tale"
    assert {stat.S_IMODE(file.stat().st_mode) for file in [*folder.iterdir()]} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_damaged_group_is_named_checked_and_repaired(tale, ask, sessions) -> None:
    assert sessions("check")[0] == 0
    whole = facts(sessions, "tale")["tokens"]
    damage_group(tale, layer=1)
    code, out, err = ask("And?")
    assert (code, out) == (1, "")
    assert "session tale is damaged: group" in err and "of layer 1" in err and "kvswap sessions repair tale" in err
    code, out, _ = sessions("check", "tale")
    assert code == 1 and "data-0: layer 1: groups" in out
    code, out, _ = sessions("repair", "tale")
    assert code == 0 and "tokens are kept" in out
    kept = facts(sessions, "tale")["tokens"]
    assert 0.5 * whole < kept < 0.7 * whole
    assert sessions("check", "tale")[0] == 0
    code, out, _ = sessions("list")
    assert "quarantine: " in out
    assert ask("And?")[0] == 0


def test_without_verification_a_damaged_group_is_read(tale, ask) -> None:
    damage_group(tale, layer=1)
    assert ask("And?", "--no-verify")[0] == 0


@pytest.mark.parametrize("name", ["manifest", "tail-1", "index-0", "basis"])
def test_damage_elsewhere_is_found_before_anything_is_computed(name, tale, ask, sessions) -> None:
    damage(tale / name)
    code, out, err = ask("And?")
    assert (code, out) == (1, "") and "session tale" in err and "repair" in err
    assert sessions("check", "tale")[0] == 1
    code, _, err = sessions("repair", "tale")
    if code == 1:  # nothing could be kept: all of it is in quarantine
        assert "it was moved to" in err and not tale.exists()
        assert (next((tale.parent / ".damaged").iterdir()) / name).exists()
    else:
        assert sessions("check", "tale")[0] == 0


def test_cut_short_and_missing_files(tale, ask, sessions) -> None:
    file, offset_bytes, _ = place_of_group(tale, layer=2, share=0.1)
    os.truncate(file, offset_bytes)
    code, _, err = ask("And?")
    assert code == 1 and f"data-0 has {offset_bytes:,} bytes instead of" in err
    assert sessions("repair", "tale")[0] == 0
    assert sessions("check", "tale")[0] == 0
    (tale / "data-0").unlink()
    assert "data-0 is gone" in ask("And?")[2]
    assert sessions("repair", "tale")[0] == 1 and not tale.exists()


def test_newer_format_is_refused_politely(tale, ask) -> None:
    manifest = tale / "manifest"
    before = {file.name: file.read_bytes() for file in tale.iterdir()}
    manifest.write_bytes(manifest.read_bytes().replace(b"kvswap-session 3 ", b"kvswap-session 4 ", 1))
    code, _, err = ask("And?")
    assert code == 2 and "made by a newer kvswap (format 4, this one reads 1 to 3); update kvswap" in err
    assert all((tale / name).read_bytes() == data for name, data in before.items() if name not in ("manifest", "lock"))


def test_links_and_foreign_files_are_refused(tale, ask, tmp_path) -> None:
    os.rename(tale / "data-0", tmp_path / "elsewhere")
    (tale / "data-0").symlink_to(tmp_path / "elsewhere")
    code, _, err = ask("And?")
    assert code == 2 and "it is a link" in err
    (tale / "data-0").unlink()
    os.mkfifo(tale / "data-0", 0o600)
    assert "no plain file" in ask("And?")[2]
    (tale / "data-0").unlink()
    os.rename(tmp_path / "elsewhere", tale / "data-0")
    os.chmod(tale / "data-0", 0o666)
    assert "written by others" in ask("And?")[2]
    os.chmod(tale / "data-0", 0o600)
    os.rename(tale, tmp_path / "moved")
    tale.symlink_to(tmp_path / "moved")
    assert "link" in ask("And?")[2]


def test_fork_shares_files_and_goes_its_own_way(tale, ask, sessions) -> None:
    before = facts(sessions, "tale")
    assert sessions("fork", "tale", "other")[0] == 0
    assert facts(sessions, "other")["shared_bytes"] > 0.9 * before["disk_bytes"]
    assert facts(sessions, "other")["disk_bytes"] < 64 << 10
    first, second = ask("And then?", session="tale"), ask("And then?", session="other")
    assert first[:2] == second[:2]
    assert sessions("check")[0] == 0
    assert sessions("rm", "tale")[0] == 0
    assert sessions("check", "other")[0] == 0
    assert sessions("fork", "other", "other")[0] == 2


def test_export_and_import(tale, ask, sessions, tmp_path) -> None:
    assert sessions("fork", "tale", "other")[0] == 0
    assert ask("And then?", session="other")[0] == 0  # two segments
    archive = tmp_path / "other.kvswap"
    assert sessions("export", "other", archive)[0] == 0
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    assert sessions("export", "other", archive)[0] == 2
    assert sessions("import", archive)[0] == 2  # the name is taken
    assert sessions("import", archive, "--name", "third")[0] == 0
    assert sessions("check")[0] == 0
    assert facts(sessions, "third")["tokens"] == facts(sessions, "other")["tokens"]
    assert ask("Why?", session="third")[:2] == ask("Why?", session="other")[:2]
    damage(archive)
    code, _, err = sessions("import", archive, "--name", "fourth")
    assert code in (1, 2) and err.startswith("error: ")
    assert not (tale.parent / "fourth").exists() and not list(tale.parent.glob(".new-*"))


def test_export_that_breaks_off_leaves_nothing_under_its_name(tale, sessions, tmp_path, monkeypatch) -> None:
    damage_group(tale, layer=2)  # found when most is written
    code, _, err = sessions("export", "tale", tmp_path / "tale.kvswap")
    assert code == 1 and "of layer 2" in err
    assert [path.name for path in tmp_path.iterdir() if "kvswap" in path.name] == []
    real, seen = os.link, []

    def look(one, other, **more):
        seen.append((Path(one).stat().st_size, os.path.lexists(other)))
        return real(one, other, **more)

    damage_group(tale, layer=2)  # the same bit again
    monkeypatch.setattr(os, "link", look)
    assert sessions("export", "tale", tmp_path / "tale.kvswap")[0] == 0
    ((size, there),) = seen
    assert not there and size == (tmp_path / "tale.kvswap").stat().st_size
    assert [path.name for path in tmp_path.iterdir() if "kvswap" in path.name] == ["tale.kvswap"]


def test_second_writer_gets_a_clear_error(tale, ask, sessions, kv_dir) -> None:
    with open_store(str(kv_dir), "tale"):
        for code, _, err in (ask("And?"), sessions("rm", "tale"), sessions("fork", "tale", "b")):
            assert code == 2 and f"session tale is in use by process {os.getpid()}" in err
        assert facts(sessions, "tale")["in_use"]
        assert sessions("check", "tale")[0] == 0
    assert ask("And?")[0] == 0


def test_wipe_says_what_it_cannot_promise(tale, sessions) -> None:
    kept = os.open(tale / "data-0", os.O_RDONLY)
    try:
        code, out, _ = sessions("wipe", "tale")
        assert code == 0 and "overwritten" in out and "Flash" in out and not tale.exists()
        assert set(os.pread(kept, 1 << 20, 0)) == {0}
    finally:
        os.close(kept)


def test_prune_removes_leftovers_alone(tale, sessions) -> None:
    (tale.parent / ".new-1234").mkdir()
    (tale / "tail-99").write_bytes(b"x")
    with open_store(str(tale.parent.parent), "tale"):
        assert "nothing" not in sessions("prune")[1]
    sessions("prune")
    assert not (tale.parent / ".new-1234").exists() and not (tale / "tail-99").exists()
    assert sessions("check", "tale")[0] == 0
    assert sessions("prune")[1] == "nothing to remove\n"


def test_prune_removes_the_quarantine_where_asked(tale, sessions) -> None:
    damage_group(tale, layer=1)
    assert sessions("repair", "tale")[0] == 0
    assert "nothing" in sessions("prune")[1] and "quarantine: " in sessions("list")[1]
    code, out, _ = sessions("prune", "--quarantine")
    assert code == 0 and "quarantined" in out
    assert "quarantine: " not in sessions("list")[1] and not list((tale.parent / ".damaged").glob("*"))
    assert sessions("check", "tale")[0] == 0


def test_encrypted_session_from_creation_to_import(ask, sessions, kv_dir, tmp_path, monkeypatch, capfd) -> None:
    import keyring

    monkeypatch.setattr(keyring, "get_password", lambda service, name: None)
    monkeypatch.delenv("KVSWAP_SESSION_KEY", raising=False)
    document = ("--document", tmp_path / "story.txt")
    code, _, err = ask("Who?", *document, "--encrypt")
    assert code == 2 and "is encrypted and there is no key; set KVSWAP_SESSION_KEY" in err
    assert list((kv_dir / "sessions").iterdir()) == []
    code, out, err = sessions("key")
    assert code == 0 and len(out.strip()) == 64 and "KVSWAP_SESSION_KEY" in err
    monkeypatch.setenv("KVSWAP_SESSION_KEY", out.strip())
    assert ask("Who?", *document, session="plain")[0] == 0
    assert ask("Who?", *document, "--encrypt")[:2] == ask("Who?", *document, session="plain2")[:2]
    assert ask("And?", session="tale")[1] == ask("And?", session="plain2")[1]
    assert ask("And?", "--encrypt")[0] == 0
    code, _, err = ask("And?", "--encrypt", session="plain")
    assert code == 2 and "session plain exists and is not encrypted" in err
    assert sessions("check")[0] == 0 and sessions("fork", "tale", "other")[0] == 0
    assert sessions("export", "other", tmp_path / "other.kvswap")[0] == 0
    assert sessions("import", tmp_path / "other.kvswap", "--name", "third")[0] == 0
    assert facts(sessions, "third")["encrypted"] and not facts(sessions, "plain")["encrypted"]
    damage_group(kv_dir / "sessions" / "tale", layer=1)
    assert sessions("check", "tale")[0] == 1 and sessions("repair", "tale")[0] == 0
    monkeypatch.setenv("KVSWAP_SESSION_KEY", "ab" * 32)
    for words in (("check", "third"), ("repair", "third"), ("fork", "third", "b"), ("export", "third", tmp_path / "x")):
        code, _, err = sessions(*words)
        assert code == 2 and "encrypted with another key" in err, words
    assert "encrypted with another key" in ask("And?", session="third")[2]
    assert ", encrypted" in sessions("list")[1]
    assert sessions("wipe", "third")[0] == 0


def test_encrypt_is_for_sessions(tiny, command) -> None:
    code, _, err = command("run", "--model", tiny, "--ask", "Who?", "--encrypt")
    assert code == 2 and "--encrypt without --session" in err


def test_key_goes_to_the_keyring_once(sessions, monkeypatch) -> None:
    import keyring

    stored = {}
    monkeypatch.setattr(keyring, "get_password", lambda *place: stored.get(place))
    monkeypatch.setattr(keyring, "set_password", lambda service, name, value: stored.update({(service, name): value}))
    code, out, _ = sessions("key", "--keyring")
    assert code == 0 and len(stored) == 1 and next(iter(stored.values())) not in out
    code, _, err = sessions("key", "--keyring")
    assert code == 2 and "has a key already" in err and len(stored) == 1


@pytest.mark.parametrize("words", [("show", "none"), ("rm", "none"), ("check", "none"), ("export", "none", "x")])
def test_absent_session(words, sessions, kv_dir) -> None:
    code, _, err = sessions(*words)
    assert code == 2 and "there is no session none; see: kvswap sessions list" in err


def rewrite(source: Path, target: Path, change) -> None:
    """Copy an archive member by member; ``change`` may alter each header and its bytes, for tarfile to write as PAX."""
    with tarfile.open(source) as old, tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as new:
        for member in old:
            data = old.extractfile(member).read()
            member, data = change(member, data)
            if member is not None:
                new.addfile(member, io.BytesIO(data))


def sparse(form: str):
    """Make the groups of the layers sparse members: a few bytes in the archive stand for all of them."""

    def change(member: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        if member.name.startswith("data-"):
            long = str(member.size)
            if form == "0.1":
                member.pax_headers = {"GNU.sparse.map": "0,16", "GNU.sparse.size": long, "GNU.sparse.numblocks": "1"}
            elif form == "0.1 bad":
                member.pax_headers = {"GNU.sparse.map": "0,x", "GNU.sparse.size": long}
            else:
                member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": long}
                data = b"1\n0\n16\n".ljust(512, b"\0") + data
            data = data[: 512 + 16 if form == "1.0" else 16]
            member.size = len(data)
        return member, data

    return change


def test_archive_never_writes_more_than_it_has(tale, sessions, tmp_path, monkeypatch) -> None:
    """A sparse member stands for more bytes than the archive has, in each of the ways that tar writes it."""
    from kvswap.disk.private_folder import PrivateFolder

    written: list[int] = []
    real = PrivateFolder.append

    def append(self: PrivateFolder, name: str, offset_bytes: int, data: bytes) -> None:
        written.append(len(data))
        real(self, name, offset_bytes, data)

    archive = tmp_path / "tale.kvswap"
    assert sessions("export", "tale", archive)[0] == 0
    monkeypatch.setattr(PrivateFolder, "append", append)
    rewrite(archive, tmp_path / "plain.kvswap", lambda member, data: (member, data))
    assert sessions("import", tmp_path / "plain.kvswap")[0] == 0 and sum(written) > 100_000
    for form in ("0.1", "1.0", "0.1 bad"):
        small = tmp_path / f"small{form[:1]}.kvswap"
        rewrite(archive, small, sparse(form))
        with contextlib.suppress(ValueError), tarfile.open(small) as seen:
            assert any(member.issparse() and member.size > 30_000 for member in seen)
        written.clear()
        code, _, err = sessions("import", small, "--name", "other")
        assert code in (1, 2) and err.startswith("error: ") and "log" not in err, form
        assert sum(written) <= small.stat().st_size
        assert not (tale.parent / "other").exists() and not list(tale.parent.glob(".new-*"))


def test_headers_of_whatever_bytes_are_an_error(tale, sessions, tmp_path) -> None:
    archive = tmp_path / "tale.kvswap"
    assert sessions("export", "tale", archive)[0] == 0
    whole, rng = archive.read_bytes(), random.Random(5)
    with tarfile.open(archive) as seen:
        starts = [member.offset for member in seen]
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 2, 8))):
            data[rng.choice(starts) + rng.randrange(512)] = rng.choice(b"\0\x80\xff09SxLKg -")
        if rng.random() < 0.7:  # with the right checksum
            for start in starts:
                data[start + 148 : start + 156] = b" " * 8
                data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
        archive.write_bytes(data)
        code, _, err = sessions("import", archive, "--name", "other")
        assert code in (0, 1, 2) and "the log is in" not in err
        if code == 0:
            assert sessions("rm", "other")[0] == 0


def test_names_in_manifests_cannot_steer_the_terminal(tale, ask, sessions, kv_dir) -> None:
    from kvswap.sessions.manifest_json import encode

    evil = "/models/\x1b[2Jevil\x1b]0;owned\x07\u202e\nsession nice  9 tokens"
    with open_store(str(kv_dir), "tale") as store:
        model = replace(store.manifest.model, name=evil, fingerprint="another")
        store.folder.replace("manifest", encode(replace(store.manifest, model=model), store.sealer.sign))
    for out in (*sessions("list"), *sessions("list", "--json"), *sessions("show", "tale"), *ask("And?")):
        assert not set(str(out)) & {"\x1b", "\x07", "\u202e"}
    code, out, _ = sessions("list")
    assert code == 0 and "\\x1b[2Jevil" in out and out.count("\n") == 2
