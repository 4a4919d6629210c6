"""Encryption of sessions: the user's key, and AES-256-GCM under keys derived from it (docs/file-format.md).

The user's key is 32 random bytes, written as 64 hexadecimal digits. It comes from an environment variable, else from
the system's keyring, and is never stored beside what it protects. ``Cipher`` is the ``Sealer`` of an encrypted session.
The libraries (``cryptography``, ``keyring``) come with the extra ``encryption`` and are loaded when they are needed.
One thread.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from typing import Any

import numpy as np

from kvswap.errors import SessionError
from kvswap.native.arrays import ByteArray, IntArray
from kvswap.sessions.arrays import Arrays, damaged, take
from kvswap.sessions.manifest import Encryption, Manifest
from kvswap.sessions.manifest_json import signature
from kvswap.sessions.seal import Checksums, Sealer
from kvswap.store.group_seals import Seals

KEY_VARIABLE = "KVSWAP_SESSION_KEY"
KEYRING_SERVICE, KEYRING_ENTRY = "kvswap", "session-key"
KEY_BYTES = 32
SALT_BYTES, TAG_BYTES, CHECK_BYTES = 16, 16, 16
CIPHER = "aes-256-gcm"
_PIECE_BYTES = 256 << 10
_NONCE = np.dtype([("layer", ">u4"), ("group", ">u8")])
_FILE_NONCE = bytes(12)  # every file has a key of its own, so one nonce is enough


# ---- the user's key


def new_key() -> str:
    """A new key, as text."""
    return secrets.token_hex(KEY_BYTES)


def user_key(label: str) -> bytes:
    """The user's key, which ``label`` needs. Raises SessionError where there is none."""
    text = os.environ.get(KEY_VARIABLE)
    if text is not None:
        return _parse_key(text.strip(), f"the environment variable {KEY_VARIABLE}")
    text = _from_keyring()
    if text is None:
        raise SessionError(
            f"{label} is encrypted and there is no key",
            hint=f"set {KEY_VARIABLE} to its 64 hexadecimal digits; kvswap sessions key makes a new one",
        )
    return _parse_key(text, "the entry of the keyring")


def store_in_keyring(key: str) -> None:
    """Store a new key in the system's keyring. Raises SessionError where it has one already, or without a keyring."""
    if _from_keyring() is not None:
        raise SessionError("the keyring has a key already", hint="sessions may need it; remove it there first")
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError as error:
        raise SessionError("a keyring needs a library", hint="pip install 'kvswap[encryption]'") from error
    try:
        keyring.set_password(KEYRING_SERVICE, KEYRING_ENTRY, key)
    except (KeyringError, RuntimeError) as error:
        raise SessionError(
            f"the system's keyring cannot be used ({str(error).splitlines()[0]:.80})",
            hint=f"set {KEY_VARIABLE} instead",
        ) from error


def _from_keyring() -> str | None:
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError:
        return None
    try:
        return keyring.get_password(KEYRING_SERVICE, KEYRING_ENTRY)
    except (KeyringError, RuntimeError):  # a machine without a keyring
        return None


def _parse_key(text: str, where: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise SessionError(
            f"{where} is no key: {len(text)} characters", hint="give 64 hexadecimal digits, as from kvswap sessions key"
        )
    return key


# ---- the sealer of a session


def new_encryption(label: str) -> Encryption:
    """What the manifest of a new encrypted session says. Raises SessionError without a key."""
    return Cipher.new(user_key(label))


def create_sealer(encryption: Encryption | None, label: str) -> Sealer:
    """The sealer of a session. Raises SessionError without its key, or with another one."""
    return Checksums() if encryption is None else Cipher(user_key(label), encryption, label)


def authenticated_sealer(manifest: Manifest, data: bytes, label: str) -> Sealer:
    """The sealer of a session whose manifest was read from ``data``, once the manifest's signature has been checked.

    Raises SessionError without the key, or with another one, and DamagedError for a manifest that is not authentic.
    """
    sealer = create_sealer(manifest.encryption, label)
    body, signed = signature(data)
    # As bytes, because compare_digest takes text only if it is ASCII, and a damaged signature may be anything.
    if manifest.encryption and not hmac.compare_digest(sealer.sign(body).encode(), signed.encode()):
        raise damaged(label, "its manifest is not authentic")
    return sealer


class Cipher:
    """Encrypts with AES-256-GCM, under keys derived from the user's key.

    A seal has the group's tag and its epoch. An epoch is one stretch of writing with a key of its own; its number
    counts the salts that this object has seen. Raises SessionError where ``encryption.check`` belongs to another key.
    """

    dtype: np.dtype[Any] = np.dtype([("tag", f"V{TAG_BYTES}"), ("epoch", "<u4")])
    encrypts = True

    def __init__(self, key: bytes, encryption: Encryption, label: str) -> None:
        self._session = _derive(key, bytes.fromhex(encryption.salt), b"kvswap session")
        if not hmac.compare_digest(_check(self._session).encode(), encryption.check.encode()):
            raise SessionError(
                f"{label} is encrypted with another key",
                hint=f"set {KEY_VARIABLE} to the key that it was made with; nothing was changed",
            )
        self._manifest = _derive(self._session, b"", b"kvswap manifest")
        self._epochs: dict[bytes, int] = {}
        self._ciphers: list[Any] = []
        self._salts: list[bytes] = []
        self._current = -1
        self._next: dict[int, int] = {}

    @staticmethod
    def new(key: bytes) -> Encryption:
        """What the manifest of a new session says."""
        salt = secrets.token_bytes(SALT_BYTES)
        return Encryption(cipher=CIPHER, salt=salt.hex(), check=_check(_derive(key, salt, b"kvswap session")))

    def begin(self) -> None:
        """Begin an epoch: a key under which nothing was encrypted yet."""
        self._current, self._next = self._epoch(secrets.token_bytes(SALT_BYTES)), {}

    def seal(self, layer: int, first: int, slots: ByteArray) -> Seals:
        """Encrypt groups in place; returns their seals. Groups of a layer come in order, each once an epoch."""
        if self._current < 0 or first < self._next.get(layer, 0):
            raise RuntimeError(f"group {first} of layer {layer} would use its nonce again")
        count, size = slots.shape
        self._next[layer] = first + count
        encrypt = self._ciphers[self._current].encrypt_into
        sealed = np.empty((count, size + TAG_BYTES), np.uint8)
        groups = np.arange(first, first + count)
        for nonce, plain, target in zip(_nonces(np.full(count, layer), groups), slots, sealed, strict=True):
            encrypt(nonce, plain, None, target)
        slots[:] = sealed[:, :size]
        seals = np.empty(count, self.dtype)
        seals["tag"] = np.ascontiguousarray(sealed[:, size:]).view(f"V{TAG_BYTES}")[:, 0]
        seals["epoch"] = self._current
        return seals

    def unseal(
        self, layers: IntArray, groups: IntArray, slots: ByteArray, seals: Seals, places: IntArray | None = None
    ) -> Any:
        """Decrypt in place; which groups are authentic, bool ``[n]``. The contents of the others are undefined."""
        right = np.empty(len(seals), np.bool_)
        piece = max(1, _PIECE_BYTES // slots.shape[1])
        for start in range(0, len(seals), piece):
            cut = slice(start, start + piece)
            rows: Any = np.arange(len(slots))[cut] if places is None else places[cut]
            targets = [slots[row] for row in rows.tolist()]
            right[cut] = self._decrypt(layers[cut], groups[cut], slots[rows], seals[cut], targets)
        return right

    def authentic(self, layer: int, first: int, slots: ByteArray, seals: Seals) -> Any:
        """Which groups are authentic; ``slots`` stay encrypted."""
        layers, groups = np.full(len(slots), layer), np.arange(first, first + len(slots))
        return self.unseal(layers, groups, slots.copy(), seals)

    def pack(self, seals: Seals) -> Arrays:
        """Tags, epochs, and the salts of these epochs."""
        used, epochs = np.unique(seals["epoch"], return_inverse=True)
        salts = b"".join(self._salts[each] for each in used.tolist())
        return {
            "tags": np.ascontiguousarray(seals["tag"]).view(np.uint8).reshape(-1),
            "epochs": epochs.reshape(-1).astype(np.uint32),
            "salts": np.frombuffer(salts, np.uint8),
        }

    def unpack(self, arrays: Arrays, what: str) -> Seals:
        """Tags, and epochs as this object numbers them."""
        tags, salts = (take(arrays, name, np.uint8, what) for name in ("tags", "salts"))
        epochs = take(arrays, "epochs", np.uint32, what)
        known = salts.size // SALT_BYTES
        if tags.size != epochs.size * TAG_BYTES or salts.size % SALT_BYTES or (epochs.astype(np.int64) >= known).any():
            raise damaged(what, "its tags, epochs and salts do not match")
        ours = [self._epoch(salts[at : at + SALT_BYTES].tobytes()) for at in range(0, salts.size, SALT_BYTES)]
        seals = np.empty(epochs.size, self.dtype)
        seals["tag"] = np.ascontiguousarray(tags).view(f"V{TAG_BYTES}")
        seals["epoch"] = np.array(ours, np.uint32)[epochs.astype(np.int64)] if epochs.size else 0
        return seals

    def wrap(self, data: bytes, name: str) -> bytes:
        """Encrypt under a key of its own."""
        salt = secrets.token_bytes(SALT_BYTES)
        sealed: bytes = _aes(_derive(self._session, salt, b"kvswap file")).encrypt(_FILE_NONCE, data, name.encode())
        return salt + sealed

    def unwrap(self, data: bytes, name: str, what: str) -> bytes:
        """Decrypt and authenticate."""
        from cryptography.exceptions import InvalidTag

        if len(data) < SALT_BYTES + TAG_BYTES:
            raise damaged(what, f"{name} is too short")
        key = _derive(self._session, data[:SALT_BYTES], b"kvswap file")
        try:
            plain: bytes = _aes(key).decrypt(_FILE_NONCE, data[SALT_BYTES:], name.encode())
        except InvalidTag as error:
            raise damaged(what, f"{name} is not what was encrypted") from error
        return plain

    def sign(self, body: bytes) -> str:
        """HMAC with SHA-256."""
        return hmac.new(self._manifest, body, hashlib.sha256).hexdigest()

    def _epoch(self, salt: bytes) -> int:
        if salt not in self._epochs:
            self._epochs[salt] = len(self._ciphers)
            self._salts.append(salt)
            self._ciphers.append(_aes(_derive(self._session, salt, b"kvswap groups")))
        return self._epochs[salt]

    def _decrypt(
        self, layers: IntArray, groups: IntArray, sealed: ByteArray, seals: Seals, targets: list[ByteArray]
    ) -> Any:
        from cryptography.exceptions import InvalidTag

        count, size = sealed.shape
        joined = np.empty((count, size + TAG_BYTES), np.uint8)  # the library expects the tag behind the ciphertext
        joined[:, :size] = sealed
        joined[:, size:] = np.ascontiguousarray(seals["tag"]).view(np.uint8).reshape(count, TAG_BYTES)
        right = np.ones(count, np.bool_)
        work = zip(seals["epoch"].tolist(), _nonces(layers, groups), joined, targets, strict=True)
        for number, (epoch, nonce, source, target) in enumerate(work):
            try:
                self._ciphers[epoch].decrypt_into(nonce, source, None, target)
            except InvalidTag:
                right[number] = False
        return right


def _nonces(layers: Any, groups: Any) -> list[bytes]:
    nonces = np.empty(len(groups), _NONCE)
    nonces["layer"], nonces["group"] = layers, groups
    found: list[bytes] = nonces.view(f"V{_NONCE.itemsize}").tolist()
    return found


def _aes(key: bytes) -> Any:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)


def _derive(key: bytes, salt: bytes, info: bytes, size_bytes: int = 32) -> bytes:
    try:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ImportError as error:
        raise SessionError("encryption needs a library", hint="pip install 'kvswap[encryption]'") from error
    return HKDF(algorithm=SHA256(), length=size_bytes, salt=salt, info=info).derive(key)


def _check(session: bytes) -> str:
    return _derive(session, b"", b"kvswap check", CHECK_BYTES).hex()
