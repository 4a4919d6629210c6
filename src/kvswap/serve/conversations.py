"""What the page needs beside OpenAI's API: documents as text, and the stored conversations.

Conversations are listed and read from disk by a thread of the loop's pool. Only the worker removes or forks one.
"""

from __future__ import annotations

from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse

from kvswap.app.documents import decode_document
from kvswap.app.prompt import Conversation
from kvswap.errors import KVSwapError
from kvswap.serve.api_errors import ApiError
from kvswap.serve.library import PREFIX
from kvswap.serve.service import Service
from kvswap.sessions.catalog import Entry, entries, open_store, sessions_dir

TITLE_CHARACTERS = 80


async def read_document(service: Service, request: Request) -> JSONResponse:
    """The text of a document in the body, whose name is in the query. Raises ApiError, InputError."""
    name, data = request.query_params.get("name") or "document", await request.body()
    document = await anyio.to_thread.run_sync(decode_document, name.replace("/", "_")[:200], data)
    return JSONResponse({"name": document.name, "text": document.text})


async def list_conversations(service: Service, request: Request) -> JSONResponse:
    """All stored conversations, the last one used first."""

    def found() -> list[dict[str, Any]]:
        listed = [_entry(service, each) for each in entries(sessions_dir(service.kv_dir)) if _has_tokens(each)]
        return sorted(listed, key=lambda each: (-each["used"], each["name"]))

    return JSONResponse({"conversations": await anyio.to_thread.run_sync(found)})


async def read_conversation(service: Service, request: Request) -> JSONResponse:
    """The messages of one conversation. Raises ApiError."""
    name = request.path_params["name"]

    def found() -> list[dict[str, Any]]:
        return [{"role": role, "content": content} for role, content in _messages(service, name)]

    try:
        return JSONResponse({"name": name, "messages": await anyio.to_thread.run_sync(found)})
    except KVSwapError as error:
        raise ApiError(404, str(error)) from error


async def fork_conversation(service: Service, request: Request) -> JSONResponse:
    """Fork a conversation; the name of the new one. Raises ApiError, KVSwapError."""
    name = request.path_params["name"]
    new = await service.worker.send(lambda: service.answers.fork(name))
    return JSONResponse({"name": new})


async def remove_conversation(service: Service, request: Request) -> JSONResponse:
    """Remove a conversation of the server from the disk. Raises ApiError, KVSwapError."""
    name = request.path_params["name"]
    await service.worker.send(lambda: service.answers.remove(name))
    return JSONResponse({"name": name, "deleted": True})


def _has_tokens(found: Entry) -> bool:
    return found.manifest is not None and bool(found.manifest.checkpoints)


def _entry(service: Service, found: Entry) -> dict[str, Any]:
    manifest = found.manifest
    assert manifest is not None and manifest.current is not None
    try:
        texts = [content for role, content in _messages(service, found.name) if role == "user"]
    except KVSwapError:  # encrypted with another key, or removed just now
        texts = []
    return {
        "name": found.name,
        "title": " ".join(texts[0][-TITLE_CHARACTERS:].split()) if texts else "",
        "tokens": manifest.current.tokens,
        "disk_bytes": found.disk_bytes,
        "used": manifest.used,
        "own": found.name.startswith(PREFIX),
    }


def _messages(service: Service, name: str) -> list[tuple[str, str]]:
    with open_store(service.kv_dir, name, write=False) as store:
        contents = store.load(tail_only=True)
        if contents is None:
            return []
        conversation = Conversation.from_json(contents.conversation, contents.ids, store.label)
    return [
        (each.role, f"{each.context}\n\n{each.content}" if each.context else each.content)
        for each in conversation.messages
    ]
