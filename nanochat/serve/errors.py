"""Errors as OpenAI's API reports them."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from nanochat.serve.schema import ErrorReply

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 404: "not_found", 413: "request_too_large", 429: "queue_full", 504: "timeout"}


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: one sentence.
        param: the field that is wrong, if it is one.
        code: for programs; by default that of the status.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or _CODES.get(status)

    def body(self) -> dict[str, Any]:
        """`{"error": ...}`"""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The HTTP response."""
        headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(self.status)
        return JSONResponse(self.body(), self.status, headers)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for the errors that an endpoint may give."""
    meanings = {
        400: "the request is not valid",
        401: "the key is missing or wrong",
        403: "the Host header is not this server's",
        404: "there is no such model",
        408: "the body did not arrive in time",
        413: "the body is too large",
        415: "the body is not JSON",
        429: "the queue is full",
        500: "the model failed",
        503: "the server is loading or stopping",
        504: "the answer took too long",
    }
    return {status: {"model": ErrorReply, "description": meanings[status]} for status in statuses}
