"""Errors in the shape of OpenAI's API, and what an error of kvswap becomes there."""

from __future__ import annotations

from typing import Any

from kvswap.errors import KVSwapError, StorageError, UserError

TOO_LONG = "context_length_exceeded"
INVALID, SERVER = "invalid_request_error", "server_error"


class ApiError(Exception):
    """An answer that is an error: HTTP status, and the fields of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}

    def body(self) -> dict[str, Any]:
        """The JSON object that clients expect."""
        fields = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": fields}


def too_long(tokens: int, limit: int) -> ApiError:
    """The error for a prompt beyond the model's context."""
    message = f"the prompt has {tokens:,} tokens, and the model's limit is {limit:,}; send less"
    return ApiError(400, message, param="messages", code=TOO_LONG)


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told about an error. One that nobody expected tells nothing about the inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, StorageError):
        return ApiError(507, str(error), kind=SERVER, code="insufficient_storage")
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, KVSwapError):
        return ApiError(500, str(error), kind=SERVER)
    return ApiError(500, "the server has failed at this request; its log says more", kind=SERVER)
