"""What stands before every endpoint: the Host header, the key, the size and time of a body, and CORS where asked for.

Plain ASGI, so that a closed connection reaches the endpoint at once.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.errors import UserError
from nanochat.serve.errors import ApiError

OPEN_PATHS = frozenset(("/", "/health"))
"""need no key: they say nothing of the models"""
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_KEY_LENGTH = 1024


def read_keys(path: Path) -> list[bytes]:
    """The keys in a file, one a line; raises `UserError` when there are none."""
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--api-key-file {path} cannot be read: {getattr(error, 'strerror', None) or 'not text'}."
        ) from error
    if not lines or any(len(line) > _KEY_LENGTH for line in lines):
        raise UserError(f"--api-key-file {path} has no key: write one a line.")
    return [line.encode() for line in lines]


class Limits:
    """Wraps an application.

    Args:
        app: the application.
        keys: of which a request must bring one as `Authorization: Bearer KEY`; none lets everybody in.
        local: take requests for this machine's own names alone, so that no web page can reach the server under a name
            of its own that leads here.
        max_body: bytes.
        body_timeout: seconds in which a body must arrive.
        origins: web pages of other servers that may read answers.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[bytes] = (),
        *,
        local: bool = False,
        max_body: int = 4 << 20,
        body_timeout: float = 30.0,
        origins: Sequence[str] = (),
    ) -> None:
        self.app, self.keys, self.local = app, list(keys), local
        self.max_body, self.body_timeout, self.origins = max_body, body_timeout, set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        send = self._with_cors(headers, send)
        try:
            if scope["method"] == "OPTIONS" and headers.get("origin") in self.origins:
                await send({"type": "http.response.start", "status": 204, "headers": []})
                await send({"type": "http.response.body", "body": b""})
                return
            self._check(scope, headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, _replay(body, receive), send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        if self.local and _host(headers.get("host", "")) not in LOCAL_HOSTS:
            raise ApiError(403, "this server answers to the names of this machine alone.")
        if not self.keys or scope["path"] in OPEN_PATHS:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("utf-8", "surrogateescape")[: _KEY_LENGTH + 1]
        # every key is compared, so that the time does not tell which one is near
        known = [hmac.compare_digest(given, key) for key in self.keys]
        if kind.lower() != "bearer" or not any(known):
            raise ApiError(401, "a key is needed: Authorization: Bearer KEY.")

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > self.max_body:
            raise self._too_large()
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the connection was closed before the body was complete.")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.max_body:
                        raise self._too_large()
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self.body_timeout:g} seconds.") from None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.max_body:,} bytes.")

    def _with_cors(self, headers: Headers, send: Send) -> Send:
        origin = headers.get("origin")
        if origin not in self.origins:
            return send

        async def wrapped(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = {
                    "access-control-allow-origin": origin,
                    "access-control-allow-headers": "authorization, content-type",
                    "access-control-allow-methods": "GET, POST",
                    "vary": "Origin",
                }
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in extra.items())]
            await send(message)

        return wrapped


def _host(header: str) -> str:
    """The name in a Host header, without the port."""
    return header.rpartition(":")[0] if header.rpartition(":")[2].isdigit() else header


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one message, then whatever comes: a disconnect."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
