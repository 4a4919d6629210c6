"""Seals of groups: what was not written that way is not taken, and no key meets a nonce twice."""

from __future__ import annotations

import numpy as np
import pytest

from kvswap.errors import DamagedError, SessionError
from kvswap.sessions import encryption
from kvswap.sessions.encryption import KEY_VARIABLE, Cipher, new_key, store_in_keyring, user_key
from kvswap.sessions.seal import Checksums, Sealer

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
ENCRYPTION = Cipher.new(KEY)


def cipher() -> Cipher:
    return Cipher(KEY, ENCRYPTION, "session tale")


@pytest.fixture
def groups() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 384), dtype=np.uint8)


def unsealed(sealer: Sealer, layers, numbers, slots, seals, places=None):
    slots = slots.copy()
    right = sealer.unseal(np.array(layers), np.array(numbers), slots, seals, places)
    return right, slots


@pytest.mark.parametrize("make", [Checksums, cipher])
def test_sealed_groups_come_back_and_damage_is_found(make, groups) -> None:
    sealer, slots = make(), groups.copy()
    sealer.begin()
    seals = sealer.seal(3, 7, slots)
    assert (slots == groups).all() == (not sealer.encrypts)
    right, found = unsealed(sealer, [3] * 5, range(7, 12), slots, seals)
    assert right.all() and (found == groups).all()
    assert sealer.authentic(3, 7, slots, seals).all()
    slots[2, 100] ^= 1
    assert sealer.authentic(3, 7, slots, seals).tolist() == [True, True, False, True, True]
    assert unsealed(sealer, [3] * 5, range(7, 12), slots, seals)[0].tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("make", [Checksums, cipher])
def test_only_the_places_asked_for_are_touched(make, groups) -> None:
    sealer, slots = make(), groups.copy()
    sealer.begin()
    seals = sealer.seal(0, 0, slots)
    sealed = slots.copy()
    places = np.array([3, 1])
    right, found = unsealed(sealer, [0, 0], [3, 1], slots, seals[places], places)
    assert right.all() and (found[places] == groups[places]).all()
    assert (found[[0, 2, 4]] == sealed[[0, 2, 4]]).all()


def test_group_in_another_place_or_session_fails(groups) -> None:
    sealer, slots = cipher(), groups.copy()
    sealer.begin()
    seals = sealer.seal(1, 4, slots)
    assert not unsealed(sealer, [1] * 5, range(5, 10), slots, seals)[0].any()
    assert not unsealed(sealer, [2] * 5, range(4, 9), slots, seals)[0].any()
    assert not unsealed(sealer, [1, 1], [5, 4], slots[[0, 1]], seals[[0, 1]])[0].any()
    wrong = seals.copy()
    wrong["tag"] = np.roll(seals["tag"], 1)
    assert not unsealed(sealer, [1] * 5, range(4, 9), slots, wrong)[0].any()
    strange = Cipher(KEY, Cipher.new(KEY), "session other")
    there = strange.unpack(sealer.pack(seals), "session other")
    assert not unsealed(strange, [1] * 5, range(4, 9), slots, there)[0].any()


def test_nonce_is_refused_a_second_time_within_an_epoch(groups) -> None:
    sealer = cipher()
    with pytest.raises(RuntimeError, match="again"):
        sealer.seal(0, 0, groups.copy())  # nothing has begun
    sealer.begin()
    first = groups.copy()
    sealer.seal(0, 0, first)
    sealer.seal(1, 0, groups.copy())
    for start in (0, 4):
        with pytest.raises(RuntimeError, match="again"):
            sealer.seal(0, start, groups.copy())
    sealer.begin()
    second = groups.copy()
    sealer.seal(0, 0, second)
    assert (first != second).mean() > 0.9  # the same groups under another key


def test_seals_survive_an_index_and_several_epochs(groups) -> None:
    sealer, parts, slots = cipher(), [], []
    for number in range(3):
        sealer.begin()
        slots.append(groups.copy())
        parts.append(sealer.seal(0, 5 * number, slots[-1]))
    seals, data = np.concatenate(parts), np.concatenate(slots)
    arrays = sealer.pack(seals)
    assert arrays["salts"].size == 3 * 16
    other = cipher()
    other.begin()  # its epochs are counted otherwise
    right, found = unsealed(other, [0] * 15, range(15), data, other.unpack(arrays, "x"))
    assert right.all() and (found == np.tile(groups, (3, 1))).all()
    assert sealer.pack(seals[5:10])["salts"].size == 16


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.pop("salts"),
        lambda arrays: arrays.update(salts=arrays["salts"][:15]),
        lambda arrays: arrays.update(epochs=arrays["epochs"] + 1),
        lambda arrays: arrays.update(tags=arrays["tags"][1:]),
        lambda arrays: arrays.update(tags=arrays["tags"].astype(np.int8)),
    ],
)
def test_impossible_seals_are_damage(change, groups) -> None:
    sealer = cipher()
    sealer.begin()
    arrays = sealer.pack(sealer.seal(0, 0, groups.copy()))
    change(arrays)
    with pytest.raises(DamagedError):
        sealer.unpack(arrays, "session tale")


def test_files_are_bound_to_their_names() -> None:
    sealer = cipher()
    one, two = sealer.wrap(b"secret", "tail-1"), sealer.wrap(b"secret", "tail-1")
    assert one != two and b"secret" not in one
    assert cipher().unwrap(one, "tail-1", "x") == b"secret"
    changed = bytes([*one[:-1], one[-1] ^ 1])
    for data, name in ((one, "tail-2"), (changed, "tail-1"), (one[:20], "tail-1"), (b"", "tail-1")):
        with pytest.raises(DamagedError):
            sealer.unwrap(data, name, "x")


def test_signature_needs_the_key() -> None:
    assert cipher().sign(b"body") == cipher().sign(b"body") != cipher().sign(b"bodz")
    assert Cipher(KEY, Cipher.new(KEY), "x").sign(b"body") != cipher().sign(b"body")


def test_another_key_is_said_to_be_one() -> None:
    with pytest.raises(SessionError, match="session tale is encrypted with another key; set KVSWAP_SESSION_KEY"):
        Cipher(OTHER, ENCRYPTION, "session tale")


class FakeKeyring:
    """What ``kvswap.sessions.encryption`` uses of a keyring."""

    def __init__(self) -> None:
        self.stored: dict[tuple[str, str], str] = {}

    def get_password(self, service: str, name: str) -> str | None:
        return self.stored.get((service, name))

    def set_password(self, service: str, name: str, value: str) -> None:
        self.stored[service, name] = value


def test_key_comes_from_the_environment_then_from_the_keyring(monkeypatch) -> None:
    import keyring

    fake = FakeKeyring()
    monkeypatch.setattr(keyring, "get_password", fake.get_password)
    monkeypatch.setattr(keyring, "set_password", fake.set_password)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(SessionError, match="session tale is encrypted and there is no key; set KVSWAP_SESSION_KEY"):
        user_key("session tale")
    key = new_key()
    store_in_keyring(key)
    assert user_key("session tale") == bytes.fromhex(key)
    with pytest.raises(SessionError, match="has a key already"):
        store_in_keyring(new_key())
    monkeypatch.setenv(KEY_VARIABLE, OTHER.hex() + "\n")
    assert user_key("session tale") == OTHER


@pytest.mark.parametrize("text", ["", "secret", "ab" * 31, "zz" * 32])
def test_what_is_no_key_is_refused(text, monkeypatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, text)
    with pytest.raises(SessionError, match="is no key"):
        user_key("session tale")


def test_without_the_library_the_hint_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives.hashes", None)
    with pytest.raises(SessionError, match=r"pip install 'kvswap\[encryption\]'"):
        Cipher.new(KEY)
    assert len(new_key()) == 64 and encryption.KEY_BYTES == 32
