"""The server's application: its paths, and errors as OpenAI's API has them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kvswap.serve.api_errors import ApiError, as_api_error
from kvswap.serve.chat import chat_completions
from kvswap.serve.completions import completions
from kvswap.serve.conversations import (
    fork_conversation,
    list_conversations,
    read_conversation,
    read_document,
    remove_conversation,
)
from kvswap.serve.fields import TokenizeRequest, read_body
from kvswap.serve.guard import Guard
from kvswap.serve.jobs import as_unexpected
from kvswap.serve.messages import read_chat
from kvswap.serve.responses import responses
from kvswap.serve.service import ClientLeft, Service

_logger = logging.getLogger("kvswap.serve")
_GONE = 499
Handler = Callable[[Service, Request], Awaitable[Any]]


def build(service: Service, *, keys: Sequence[str] = (), hosts: Sequence[str] = ()) -> Starlette:
    """The application for a service. ``keys`` and ``hosts`` are as for ``Guard``."""
    posts: dict[str, Handler] = {
        "/v1/chat/completions": chat_completions,
        "/v1/completions": completions,
        "/v1/responses": responses,
        "/tokenize": tokenize,
        "/documents": read_document,
        "/conversations/{name}/fork": fork_conversation,
    }
    gets: dict[str, Handler] = {
        "/v1/models": models,
        "/v1/models/{name:path}": one_model,
        "/health": health,
        "/metrics": metrics,
        "/conversations": list_conversations,
        "/conversations/{name}": read_conversation,
        **{path: page for path in PAGE},
    }
    routes = [Route(path, _endpoint(service, path, handler), methods=["POST"]) for path, handler in posts.items()]
    routes += [Route(path, _endpoint(service, path, handler), methods=["GET"]) for path, handler in gets.items()]
    path = "/conversations/{name}"
    routes.append(Route(path, _endpoint(service, path, remove_conversation), methods=["DELETE"]))
    guard = Middleware(Guard, keys=keys, hosts=hosts)
    return Starlette(routes=routes, middleware=[guard], exception_handlers={HTTPException: _http_error})


def _endpoint(service: Service, path: str, handler: Handler) -> Callable[[Request], Awaitable[Any]]:
    """A handler with its errors as responses, counted."""

    async def endpoint(request: Request) -> Any:
        try:
            response = await handler(service, request)
            status = getattr(response, "status_code", 200)
        except (ClientDisconnect, ClientLeft):
            response, status = Response(status_code=_GONE), _GONE
        except Exception as error:
            if as_unexpected(error):
                _logger.exception("a request failed")
            told = as_api_error(error)
            response, status = JSONResponse(told.body(), told.status, headers=told.headers), told.status
        service.metrics.requests.labels(path, str(status)).inc()
        return response

    return endpoint


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: f"there is nothing at {request.url.path[:100]}", 405: f"{request.method} is not allowed here"}
    told = ApiError(error.status_code, words.get(error.status_code, error.detail))
    return JSONResponse(told.body(), told.status, headers=error.headers)


# ---- small endpoints


async def health(service: Service, request: Request) -> Response:
    """Whether the server works."""
    return JSONResponse({"status": "ok", "waiting": service.worker.waiting, "running": service.worker.running})


async def models(service: Service, request: Request) -> Response:
    """The one model, in a list."""
    return JSONResponse({"object": "list", "data": [_model(service)]})


async def one_model(service: Service, request: Request) -> Response:
    """The one model by its name. Raises ApiError for another."""
    if request.path_params["name"] != service.name:
        raise ApiError(404, f"the model here is {service.name}", param="model", code="model_not_found")
    return JSONResponse(_model(service))


async def metrics(service: Service, request: Request) -> Response:
    """Numbers for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def tokenize(service: Service, request: Request) -> Response:
    """Token ids of a text or a chat. Raises ApiError, KVSwapError."""
    given = read_body(await request.body(), TokenizeRequest)
    text = given.content if given.content is not None else given.prompt
    if given.messages is not None:
        ids = await service.chat_ids(read_chat(given.messages), None)
    elif text is not None:
        ids = await service.text_ids(text) if text else []
    else:
        raise ApiError(400, "give content, prompt or messages", param="content")
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.limit_tokens})


def _model(service: Service) -> dict[str, Any]:
    fields = {"id": service.name, "object": "model", "created": service.created, "owned_by": "kvswap"}
    return {**fields, "context_length": service.limit_tokens, "max_model_len": service.limit_tokens}


# ---- the page

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def page(service: Service, request: Request) -> Response:
    """A file of the page."""
    name, kind = PAGE[request.url.path]
    return Response(files("kvswap.serve").joinpath("page", name).read_bytes(), media_type=kind, headers=_PAGE_HEADERS)
