"""The HTTP application: OpenAI's endpoints, those of a running server, and the chat page."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

import nanochat
from nanochat.errors import UserError
from nanochat.serve.completions import ChatCompletion, TextCompletion, respond
from nanochat.serve.engine import Engine, Full
from nanochat.serve.errors import ApiError, documented
from nanochat.serve.limits import Limits
from nanochat.serve.metrics import Metrics
from nanochat.serve.models import Model
from nanochat.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)

log = logging.getLogger("nanochat.serve")
ALWAYS = (401, 403, 408, 413)  # what `Limits` may answer anywhere
MODEL_ERRORS = documented(400, 404, 415, 500, 503, *ALWAYS)
ANSWER_ERRORS = documented(400, 404, 415, 429, 500, 503, 504, *ALWAYS)
CONTENT_SECURITY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class ServerSettings:
    """Limits of a server: sizes in bytes, times in seconds."""

    keys: Sequence[bytes] = ()
    local: bool = True
    """answer to this machine's own names alone"""
    origins: Sequence[str] = ()
    max_body: int = 4 << 20
    body_timeout: float = 30.0
    timeout: float = 600.0
    """of one answer, its time in the queue included"""
    max_waiting: int = 256
    grace: float = 30.0
    """for running answers, when the server stops"""


class Server:
    """The models of one application, once they are loaded."""

    def __init__(self, load: Callable[[], list[Model]], settings: ServerSettings) -> None:
        self._load, self.settings = load, settings
        self.engines: dict[str, Engine] = {}
        self.ready = False
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.started = int(time.time())
        self.metrics = Metrics(self.engines)

    async def start(self) -> None:
        """Load the models beside the event loop."""
        try:
            models = await asyncio.to_thread(self._load)
        except Exception as error:
            self.failure = error
            self.on_failure()
            return
        self.engines.update({model.name: Engine(model, self.settings.max_waiting) for model in models})
        self.ready = True

    async def stop(self) -> None:
        """Let running answers finish within the grace time."""
        self.ready = False
        await asyncio.gather(
            *(asyncio.to_thread(engine.close, self.settings.grace) for engine in self.engines.values())
        )

    def engine(self, name: str | None) -> Engine:
        """The engine of a model by name, or of the first one; raises `ApiError`."""
        if not self.ready:
            raise ApiError(503, "the model is loading; try again later.", code="loading")
        if name is None:
            return next(iter(self.engines.values()))
        if name not in self.engines:
            names = ", ".join(self.engines)
            raise ApiError(404, f"there is no model {name!r} here; there is {names}.", "model", "model_not_found")
        return self.engines[name]


@cache
def page() -> str:
    """The chat page."""
    return (Path(__file__).parent / "page.html").read_text(encoding="utf-8")


def create_app(server: Server) -> ASGIApp:
    """The application of a server; its models are loaded when it starts."""

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        loading = asyncio.create_task(server.start())
        yield
        await loading
        await server.stop()

    app = FastAPI(
        title="nanochat",
        version=nanochat.__version__,
        description="OpenAI's API for models that nanochat trained.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    _add_errors(app)
    _add_count(app, server)
    _add_information(app, server)
    _add_answers(app, server)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    settings = server.settings
    return Limits(
        app,
        settings.keys,
        local=settings.local,
        max_body=settings.max_body,
        body_timeout=settings.body_timeout,
        origins=settings.origins,
    )


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        if first["type"] == "json_invalid":
            return ApiError(400, f"the body is not JSON: {first['ctx']['error']}.").response()
        if first["type"] == "model_attributes_type" and not _says_json(request.headers.get("content-type", "")):
            return ApiError(415, "send a JSON object with Content-Type: application/json.").response()
        # a union names its member behind the field
        field = place[0] if place else None
        return ApiError(400, f"{field or 'the body'}: {first['msg']}.", field).response()

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        response = ApiError(error.status_code, f"{str(error.detail).rstrip('.')}.").response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        log.exception("a request failed", exc_info=error)
        return ApiError(500, "the server failed on this request.").response()


def _says_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _add_count(app: FastAPI, server: Server) -> None:
    class Count:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope, receive, send) -> None:
            async def counted(message) -> None:
                if message["type"] == "http.response.start":
                    route = getattr(scope.get("route"), "path", "other")
                    server.metrics.requests.labels(route, message["status"]).inc()
                await send(message)

            await self.app(scope, receive, counted if scope["type"] == "http" else send)

    app.add_middleware(Count)


def _add_information(app: FastAPI, server: Server) -> None:
    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page(), headers={"Content-Security-Policy": CONTENT_SECURITY})

    @app.get("/health", responses=documented(503, *ALWAYS))
    async def health() -> Response:
        """200 when the models answer, 503 while they are loaded."""
        if server.ready:
            return JSONResponse({"status": "ok"})
        return ApiError(503, "the model is loading; try again later.", code="loading").response()

    @app.get("/metrics", responses=documented(*ALWAYS), response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counts for Prometheus."""
        return PlainTextResponse(server.metrics.text(), media_type="text/plain; version=0.0.4")

    def describe(engine: Engine) -> dict[str, Any]:
        model = engine.model
        return {
            "id": model.name,
            "object": "model",
            "created": server.started,
            "owned_by": "nanochat",
            "meta": {
                "backend": model.backend.name,
                "context": model.backend.context,
                "vocab_size": model.codec.vocab_size,
                "slots": model.backend.slots,
                "drafts": model.backend.drafts,
                "chat": model.is_chat,
            },
        }

    @app.get("/v1/models", responses=documented(503, *ALWAYS))
    async def models() -> dict[str, Any]:
        """Every model; `meta.chat` says whether it was made for conversations."""
        server.engine(None)
        return {"object": "list", "data": [describe(engine) for engine in server.engines.values()]}

    @app.get("/v1/models/{name:path}", responses=documented(404, 503, *ALWAYS))
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        return describe(server.engine(name))

    @app.post("/tokenize", responses=MODEL_ERRORS)
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The tokens of a text."""
        codec = server.engine(body.model).model.codec
        try:
            tokens = codec.encode(body.content)
        except UserError as error:
            raise ApiError(400, str(error), "content") from error
        return {"tokens": [*codec.begin, *tokens] if body.add_special else tokens}

    @app.post("/detokenize", responses=MODEL_ERRORS)
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of tokens; ids without a token give nothing."""
        return {"content": server.engine(body.model).model.codec.decode(body.tokens)}


def _add_answers(app: FastAPI, server: Server) -> None:
    timeout = server.settings.timeout
    events = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}

    @app.post("/v1/completions", responses={**events, **ANSWER_ERRORS})
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or several texts, given as text or tokens."""
        engine = server.engine(body.model)
        return await respond(TextCompletion(engine, body, timeout), request.receive, server.metrics)

    @app.post("/v1/chat/completions", responses={**events, **ANSWER_ERRORS})
    async def chat(body: ChatRequest, request: Request) -> Response:
        """The next message of a conversation."""
        engine = server.engine(body.model)
        return await respond(ChatCompletion(engine, body, timeout), request.receive, server.metrics)

    @app.post("/v1/embeddings", responses=ANSWER_ERRORS)
    async def embeddings(body: EmbeddingRequest) -> dict[str, Any]:
        """The mean of the final hidden states of each text (torch backend)."""
        engine = server.engine(body.model)
        codec, backend = engine.model.codec, engine.model.backend
        try:
            texts = [
                [*codec.begin, *codec.encode(text)] if isinstance(text, str) else list(text) for text in body.inputs
            ]
            for tokens in texts:
                if not tokens or len(tokens) > backend.context or max(tokens) >= codec.vocab_size:
                    raise UserError(
                        f"a text must have from 1 to {backend.context} tokens, with ids below {codec.vocab_size}."
                    )
            futures = [engine.call(lambda tokens=tokens: backend.embed(tokens)) for tokens in texts]
            vectors = [await asyncio.wait_for(asyncio.wrap_future(future), timeout) for future in futures]
        except UserError as error:
            raise ApiError(400, str(error), "input") from error
        except Full:
            raise ApiError(429, "the queue is full; try again later.") from None
        except TimeoutError:
            raise ApiError(504, f"the embedding took longer than {timeout:g} seconds.") from None
        return {
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": _vector(vector.cpu().numpy(), body.encoding_format),
                }
                for index, vector in enumerate(vectors)
            ],
            "model": engine.model.name,
            "usage": {"prompt_tokens": sum(map(len, texts)), "total_tokens": sum(map(len, texts))},
        }


def _vector(values: np.ndarray, encoding: str | None) -> str | list[float]:
    values = values.astype("<f4")
    return base64.b64encode(values.tobytes()).decode() if encoding == "base64" else values.tolist()


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without the status 422, which FastAPI lists and this server does not use."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema
