"""What is checked before a request is looked at: host, origin, key, and the size of the body.

A page of another site can make a browser send requests to a server on the same machine. Its requests carry the page's
origin, or, where its domain name was made to point here (DNS rebinding), that name as the host. Both are refused: a
host has to be an address, ``localhost`` or a name that was allowed, and an origin has to be that of this server. No
header allows other origins (CORS).
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvswap.serve.api_errors import ApiError
from kvswap.units import format_bytes

MOST_BODY_BYTES = 32 << 20
OPEN_PATHS = ("/", "/health", "/page.js", "/page.css")
"""Need no key: a page has to be loaded before somebody can type one."""


class Guard:
    """Refuses what should not get in. ``keys`` are those of the API, none where everybody may use it."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], hosts: Sequence[str]) -> None:
        self._app, self._keys = app, [key.encode() for key in keys]
        self._hosts = {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        try:
            headers = Headers(scope=scope)
            self._check(headers, scope["path"])
            limited = _Limited(receive, _body_bytes(headers))
        except ApiError as error:
            response = JSONResponse(error.body(), error.status, headers={**error.headers, "Connection": "close"})
            return await response(scope, receive, send)
        await self._app(scope, limited.receive, send)

    def _check(self, headers: Headers, path: str) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_ours(_name(f"//{host}")):
            message = f"host {host[:100]!r} is not this server; allow it with --allow-host"
            raise ApiError(403, message, code="host_not_allowed")
        if origin is not None and _place(origin) != host.lower():
            raise ApiError(403, "requests from pages of other sites are not allowed", code="origin_not_allowed")
        if self._keys and path not in OPEN_PATHS:
            kind, _, given = headers.get("authorization", "").partition(" ")
            matches = [hmac.compare_digest(key, given.strip().encode()) for key in self._keys]
            if kind.lower() != "bearer" or not any(matches):
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    def _is_ours(self, name: str | None) -> bool:
        if not name:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._hosts
        return True


class _Limited:
    """Reads a body up to its limit."""

    def __init__(self, receive: Receive, announced_bytes: int) -> None:
        self._receive, self._read_bytes = receive, 0
        if announced_bytes > MOST_BODY_BYTES:
            raise _too_large()

    async def receive(self) -> Message:
        message = await self._receive()
        self._read_bytes += len(message.get("body", b""))
        if self._read_bytes > MOST_BODY_BYTES:
            raise _too_large()
        return message


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {format_bytes(MOST_BODY_BYTES)}", code="request_too_large")


def _body_bytes(headers: Headers) -> int:
    given = headers.get("content-length", "0")
    if not (given.isascii() and given.isdigit()):
        raise ApiError(400, "Content-Length is no number")
    return int(given[:20])


def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _place(origin: str) -> str | None:
    """Host and port of an origin; None where it has none."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None
