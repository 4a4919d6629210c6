"""Where the key of encrypted sessions comes from: an environment variable, else the system's keyring.

A key is 32 random bytes, written as 64 hexadecimal digits. It is never stored beside what it protects. Both libraries
(``cryptography``, ``keyring``) come with the extra ``encryption`` and are loaded when they are needed.
"""

from __future__ import annotations

import os
import secrets

from kvswap.errors import SessionError

ENVIRONMENT = "KVSWAP_SESSION_KEY"
SERVICE, ENTRY = "kvswap", "session-key"
KEY_BYTES = 32


def new_key() -> str:
    """A new key, as text."""
    return secrets.token_hex(KEY_BYTES)


def master_key(what: str) -> bytes:
    """The user's key; ``what`` needs it. Raises SessionError where there is none."""
    text = os.environ.get(ENVIRONMENT)
    if text is not None:
        return _parse(text.strip(), f"the environment variable {ENVIRONMENT}")
    text = _from_keyring()
    if text is None:
        raise SessionError(
            f"{what} is encrypted and there is no key",
            hint=f"set {ENVIRONMENT} to its 64 hexadecimal digits; kvswap sessions key makes a new one",
        )
    return _parse(text, "the entry of the keyring")


def store_in_keyring(key: str) -> None:
    """Keep a new key in the system's keyring. Raises SessionError where there is one, or no keyring."""
    if _from_keyring() is not None:
        raise SessionError("the keyring has a key already", hint="sessions may need it; remove it there first")
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError as error:
        raise SessionError("a keyring needs a library", hint="pip install 'kvswap[encryption]'") from error
    try:
        keyring.set_password(SERVICE, ENTRY, key)
    except (KeyringError, RuntimeError) as error:
        raise SessionError(
            f"the system's keyring cannot be used ({str(error).splitlines()[0]:.80})",
            hint=f"set {ENVIRONMENT} instead",
        ) from error


def _from_keyring() -> str | None:
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError:
        return None
    try:
        return keyring.get_password(SERVICE, ENTRY)
    except (KeyringError, RuntimeError):  # a machine without one
        return None


def _parse(text: str, where: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise SessionError(
            f"{where} is no key: {len(text)} characters", hint="give 64 hexadecimal digits, as from kvswap sessions key"
        )
    return key
