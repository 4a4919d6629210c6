"""What tells that stored bytes are what was written: checksums, or authenticated encryption (docs/file-format.md).

A ``Sealer`` seals groups as they are written and unseals them as they are read, and wraps the small files of a session.
``Checksums`` leaves bytes as they are and finds damage; ``Cipher`` encrypts with AES-256-GCM and finds deceit as well.
One thread.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvswap.errors import DamagedError, SessionError
from kvswap.sessions.manifest import Encryption
from kvswap.store.checksum import group_sums
from kvswap.terms import ByteArray, IntArray

Seals = NDArray[Any]
Arrays = dict[str, NDArray[np.generic]]

SALT_BYTES, TAG_BYTES, CHECK_BYTES = 16, 16, 16
CIPHER = "aes-256-gcm"
_PIECE_BYTES = 256 << 10
_NONCE = np.dtype([("layer", ">u4"), ("group", ">u8")])
_ONCE = bytes(12)  # a file key meets one nonce


class Sealer(Protocol):
    """Seals are arrays of ``dtype``, one entry a group. ``slots`` are uint8 ``(n, group_bytes)``, rows contiguous."""

    dtype: np.dtype[Any]
    encrypts: bool

    def begin(self) -> None:
        """A new stretch of writing groups begins."""

    def seal(self, layer: int, first: int, slots: ByteArray) -> Seals:
        """Seal groups from ``first`` on in place."""

    def unseal(
        self, layers: IntArray, groups: IntArray, slots: ByteArray, seals: Seals, places: IntArray | None = None
    ) -> Any:
        """Turn sealed groups into what was written, in place; which are so, bool ``(n,)``.

        They are the rows ``places`` of ``slots``, or all.
        """

    def authentic(self, layer: int, first: int, slots: ByteArray, seals: Seals) -> Any:
        """Which groups from ``first`` on are what was written, bool ``(n,)``; they stay sealed."""

    def pack(self, seals: Seals) -> Arrays:
        """Seals as arrays for an index."""

    def unpack(self, arrays: Arrays, what: str) -> Seals:
        """The same back. Raises DamagedError."""

    def wrap(self, data: bytes, name: str) -> bytes:
        """A small file as it is stored under a name."""

    def unwrap(self, data: bytes, name: str, what: str) -> bytes:
        """The same back. Raises DamagedError."""

    def sign(self, body: bytes) -> str:
        """What authenticates a manifest; empty where nothing does."""


class Checksums:
    """Bytes as they are, with XXH3 of 64 bits."""

    dtype: np.dtype[Any] = np.dtype(np.uint64)
    encrypts = False

    def begin(self) -> None:
        """Nothing to begin."""

    def seal(self, layer: int, first: int, slots: ByteArray) -> Seals:
        """Checksums of groups, uint64 ``(n,)``."""
        return group_sums(slots)

    def unseal(
        self, layers: IntArray, groups: IntArray, slots: ByteArray, seals: Seals, places: IntArray | None = None
    ) -> Any:
        """Which groups have their checksum."""
        return group_sums(slots if places is None else slots[places]) == seals

    def authentic(self, layer: int, first: int, slots: ByteArray, seals: Seals) -> Any:
        """Which groups have their checksum."""
        return group_sums(slots) == seals

    def pack(self, seals: Seals) -> Arrays:
        """One array."""
        return {"sums": seals}

    def unpack(self, arrays: Arrays, what: str) -> Seals:
        """One array."""
        sums = _take(arrays, "sums", np.uint64, what)
        return sums.astype(np.uint64, copy=False)

    def wrap(self, data: bytes, name: str) -> bytes:
        """As it is."""
        return data

    def unwrap(self, data: bytes, name: str, what: str) -> bytes:
        """As it is."""
        return data

    def sign(self, body: bytes) -> str:
        """Nothing."""
        return ""


class Cipher:
    """AES-256-GCM under keys derived from the master key. Raises SessionError for another key than ``check`` says.

    ``dtype`` has the tag and the epoch, a place among the salts that this object has met.
    """

    dtype: np.dtype[Any] = np.dtype([("tag", f"V{TAG_BYTES}"), ("epoch", "<u4")])
    encrypts = True

    def __init__(self, master: bytes, encryption: Encryption, what: str) -> None:
        self._session = _derive(master, bytes.fromhex(encryption.salt), b"kvswap session")
        if not hmac.compare_digest(_check(self._session).encode(), encryption.check.encode()):
            raise SessionError(
                f"{what} is encrypted with another key",
                hint="set KVSWAP_SESSION_KEY to the key that it was made with; nothing was changed",
            )
        self._manifest = _derive(self._session, b"", b"kvswap manifest")
        self._epochs: dict[bytes, int] = {}
        self._ciphers: list[Any] = []
        self._salts: list[bytes] = []
        self._current = -1
        self._next: dict[int, int] = {}

    @staticmethod
    def new(master: bytes) -> Encryption:
        """What the manifest of a new session says."""
        salt = secrets.token_bytes(SALT_BYTES)
        return Encryption(cipher=CIPHER, salt=salt.hex(), check=_check(_derive(master, salt, b"kvswap session")))

    def begin(self) -> None:
        """Begin an epoch: a key that no group was encrypted with."""
        self._current, self._next = self._epoch(secrets.token_bytes(SALT_BYTES)), {}

    def seal(self, layer: int, first: int, slots: ByteArray) -> Seals:
        """Encrypt groups in place; their tags and epoch. Groups of a layer come in order, each once an epoch."""
        if self._current < 0 or first < self._next.get(layer, 0):
            raise RuntimeError(f"group {first} of layer {layer} would meet its nonce again")
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
        """Decrypt in place; those that are not authentic are left as they are, or hold anything."""
        right = np.empty(len(seals), np.bool_)
        piece = max(1, _PIECE_BYTES // slots.shape[1])
        for start in range(0, len(seals), piece):
            cut = slice(start, start + piece)
            rows: Any = np.arange(len(slots))[cut] if places is None else places[cut]
            targets = [slots[row] for row in rows.tolist()]
            right[cut] = self._decrypt(layers[cut], groups[cut], slots[rows], seals[cut], targets)
        return right

    def authentic(self, layer: int, first: int, slots: ByteArray, seals: Seals) -> Any:
        """Which groups can be decrypted."""
        layers, groups = np.full(len(slots), layer), np.arange(first, first + len(slots))
        return self.unseal(layers, groups, slots.copy(), seals)

    def pack(self, seals: Seals) -> Arrays:
        """Tags, epochs and the salts that these have."""
        used, epochs = np.unique(seals["epoch"], return_inverse=True)
        salts = b"".join(self._salts[each] for each in used.tolist())
        return {
            "tags": np.ascontiguousarray(seals["tag"]).view(np.uint8).reshape(-1),
            "epochs": epochs.reshape(-1).astype(np.uint32),
            "salts": np.frombuffer(salts, np.uint8),
        }

    def unpack(self, arrays: Arrays, what: str) -> Seals:
        """Tags and epochs, the latter as this object counts them."""
        tags, salts = (_take(arrays, name, np.uint8, what) for name in ("tags", "salts"))
        epochs = _take(arrays, "epochs", np.uint32, what)
        known = salts.size // SALT_BYTES
        if tags.size != epochs.size * TAG_BYTES or salts.size % SALT_BYTES or (epochs.astype(np.int64) >= known).any():
            raise _damaged(what, "its tags, epochs and salts do not belong together")
        ours = [self._epoch(salts[at : at + SALT_BYTES].tobytes()) for at in range(0, salts.size, SALT_BYTES)]
        seals = np.empty(epochs.size, self.dtype)
        seals["tag"] = np.ascontiguousarray(tags).view(f"V{TAG_BYTES}")
        seals["epoch"] = np.array(ours, np.uint32)[epochs.astype(np.int64)] if epochs.size else 0
        return seals

    def wrap(self, data: bytes, name: str) -> bytes:
        """Encrypt under a key of its own."""
        salt = secrets.token_bytes(SALT_BYTES)
        sealed: bytes = _aes(_derive(self._session, salt, b"kvswap file")).encrypt(_ONCE, data, name.encode())
        return salt + sealed

    def unwrap(self, data: bytes, name: str, what: str) -> bytes:
        """Decrypt and authenticate."""
        from cryptography.exceptions import InvalidTag

        if len(data) < SALT_BYTES + TAG_BYTES:
            raise _damaged(what, f"{name} is too short")
        key = _derive(self._session, data[:SALT_BYTES], b"kvswap file")
        try:
            plain: bytes = _aes(key).decrypt(_ONCE, data[SALT_BYTES:], name.encode())
        except InvalidTag as error:
            raise _damaged(what, f"{name} is not what was encrypted") from error
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
        joined = np.empty((count, size + TAG_BYTES), np.uint8)  # the library wants the tag behind the ciphertext
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


def _take(arrays: Arrays, name: str, dtype: type, what: str) -> NDArray[np.generic]:
    found = arrays.get(name)
    if found is None or found.dtype != np.dtype(dtype) or found.ndim != 1:
        raise _damaged(what, f"{name} is missing or of another kind")
    return found


def _damaged(what: str, why: str) -> DamagedError:
    return DamagedError(f"{what} is damaged: {why}", hint="try: kvswap sessions repair")
