"""`/v1/completions` and `/v1/chat/completions`: one flow for both, whole or streamed."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanochat.errors import UserError
from nanochat.serve.answers import Answer, Piece, chat_logprobs, completion_logprobs
from nanochat.serve.engine import Engine, Full
from nanochat.serve.errors import ApiError
from nanochat.serve.metrics import Metrics
from nanochat.serve.schema import AnswerFields, ChatRequest, CompletionRequest

MOST_ANSWERS = 256
"""answers that one request may ask for"""


class Completion(ABC):
    """One request: its answers, and how OpenAI's API writes them."""

    id_prefix: str
    whole: str
    chunk: str
    """`object` of a whole reply and of a chunk"""

    def __init__(self, engine: Engine, request: AnswerFields, timeout: float) -> None:
        self.engine, self.codec, self.timeout = engine, engine.model.codec, timeout
        self.fields = request
        self.id = f"{self.id_prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.answers: list[Answer] = []
        self.prompts: list[list[int]] = []

    @abstractmethod
    def choice(self, index: int, text: str, piece: Piece, length: int) -> dict[str, Any]:
        """A choice of a whole reply; length: tokens of the prompt, which `piece.prompt` may hold."""

    @abstractmethod
    def delta(self, index: int, piece: Piece, shown: int) -> dict[str, Any]:
        """A choice of a chunk; shown: characters of it that were sent before."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """A choice's first chunk, before any text."""
        return None

    def prepare(self, prompts: list[list[int]], max_tokens: int | None, stops: list[str], **options: Any) -> None:
        """Make the answers and hand them to the model; raises `ApiError`."""
        fields, context = self.fields, self.engine.model.backend.context
        count = fields.n or 1
        if count * len(prompts) > MOST_ANSWERS:
            raise ApiError(400, f"a request may ask for {MOST_ANSWERS} answers, not {count * len(prompts)}.", "n")
        seed = secrets.randbelow(2**62) if fields.seed is None else fields.seed
        wanted = context if max_tokens is None else max_tokens
        for prompt in prompts:
            if fields.truncate == "left" and len(prompt) + min(wanted, context // 2) > context:
                prompt = prompt[-max(1, context - max(1, min(wanted, context // 2))) :]
            if len(prompt) >= context and not (len(prompt) == context and wanted <= 1):
                raise ApiError(
                    400,
                    f"the prompt has {len(prompt)} tokens, and the model's context of {context} leaves no room for an "
                    'answer; shorten it, or send "truncate": "left".',
                    "messages" if isinstance(fields, ChatRequest) else "prompt",
                    "context_length_exceeded",
                )
            self.prompts.append(prompt)
            for index in range(count):
                self.answers.append(
                    Answer(
                        self.engine,
                        prompt,
                        min(wanted, context - len(prompt) + 1),
                        fields.sampling(),
                        seed + index,
                        stops,
                        **options,
                    )
                )
        try:
            self.engine.submit([answer.request for answer in self.answers])
        except UserError as error:
            raise ApiError(400, str(error)) from error
        except Full:
            raise ApiError(429, "the queue is full; try again later.") from None

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompts, each counted once, and of all answers."""
        prompt, written = sum(map(len, self.prompts)), sum(answer.written for answer in self.answers)
        reused = sum(answer.request.reused for answer in self.answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": min(reused, prompt)},
        }

    def frame(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """What surrounds choices."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.engine.model.name,
            "choices": choices,
            **more,
        }

    async def reply(self) -> dict[str, Any]:
        """The whole reply."""

        async def gather(index: int, answer: Answer) -> dict[str, Any]:
            whole = Piece()
            texts = []
            async for piece in answer.pieces(self.timeout):
                texts.append(piece.text)
                whole.tokens += piece.tokens
                whole.prompt = whole.prompt or piece.prompt
                whole.reason = piece.reason
            return self.choice(index, "".join(texts), whole, len(answer.request.prompt))

        choices = await asyncio.gather(*(gather(index, answer) for index, answer in enumerate(self.answers)))
        return self.frame(self.whole, list(choices), usage=self.usage())

    async def events(self) -> AsyncIterator[str]:
        """The data of the server-sent events; an error is the last one."""
        more = {"usage": None} if self.fields.wants_usage else {}
        merged: asyncio.Queue[tuple[int, Piece] | ApiError] = asyncio.Queue()

        async def forward(index: int, answer: Answer) -> None:
            try:
                async for piece in answer.pieces(self.timeout):
                    merged.put_nowait((index, piece))
            except ApiError as error:
                merged.put_nowait(error)

        tasks = [asyncio.create_task(forward(index, answer)) for index, answer in enumerate(self.answers)]
        try:
            for index in range(len(self.answers)):
                opening = self.opening(index)
                if opening is not None:
                    yield _json(self.frame(self.chunk, [opening], **more))
            shown, left = [0] * len(self.answers), len(self.answers)
            while left:
                item = await merged.get()
                if isinstance(item, ApiError):
                    yield _json(item.body())
                    return
                index, piece = item
                if piece.text or piece.tokens or piece.prompt or piece.reason:
                    yield _json(self.frame(self.chunk, [self.delta(index, piece, shown[index])], **more))
                    shown[index] += len(piece.text)
                left -= piece.reason is not None
            if self.fields.wants_usage:
                yield _json(self.frame(self.chunk, [], usage=self.usage()))
            yield "[DONE]"
        finally:
            for task in tasks:
                task.cancel()

    def finish(self, metrics: Metrics) -> None:
        """End what has not ended, and count."""
        end = time.monotonic()
        for answer in self.answers:
            answer.cancel()
            metrics.answered(answer, end)


class TextCompletion(Completion):
    """`/v1/completions`."""

    id_prefix, whole, chunk = "cmpl", "text_completion", "text_completion"
    fields: CompletionRequest

    def start(self) -> None:
        """Read the prompts and begin; raises `ApiError`."""
        fields, begin = self.fields, self.codec.begin
        try:
            prompts = [
                [*begin, *self.codec.encode(prompt)] if isinstance(prompt, str) else prompt for prompt in fields.prompts
            ]
        except UserError as error:
            raise ApiError(400, str(error), "prompt") from error
        if not all(prompts):
            raise ApiError(400, "the prompt has no tokens.", "prompt")
        # `begin` is not part of what is echoed
        self.hidden = [len(begin) if isinstance(prompt, str) else 0 for prompt in fields.prompts]
        self.prepare(
            prompts,
            16 if fields.max_tokens is None else fields.max_tokens,
            fields.stops,
            logprobs=fields.logprobs,
            score_prompt=bool(fields.echo and fields.logprobs is not None),
        )

    def _echo(self, index: int) -> tuple[str, int]:
        """The text of a choice's prompt, and its hidden tokens."""
        place = index // (self.fields.n or 1)
        prompt, given = self.prompts[place], self.fields.prompts[place]
        hidden = self.hidden[place] if len(prompt) >= self.hidden[place] else 0
        return (given if isinstance(given, str) else self.codec.decode(prompt)), hidden

    def choice(self, index: int, text: str, piece: Piece, length: int) -> dict[str, Any]:
        tokens = piece.tokens
        offset = 0
        if self.fields.echo:
            echo, hidden = self._echo(index)
            text = echo + text
            if piece.prompt is not None:
                tokens = [*piece.prompt[hidden:], *tokens]
            else:
                offset = len(echo)
        scored = self.fields.logprobs is not None
        return {
            "index": index,
            "text": text,
            "logprobs": completion_logprobs(self.codec, tokens, offset) if scored else None,
            "finish_reason": piece.reason,
        }

    def delta(self, index: int, piece: Piece, shown: int) -> dict[str, Any]:
        scored = self.fields.logprobs is not None
        tokens = piece.tokens
        if piece.prompt is not None:
            tokens = piece.prompt[self._echo(index)[1] :]
        elif self.fields.echo:
            shown += len(self._echo(index)[0])
        return {
            "index": index,
            "text": piece.text,
            "logprobs": completion_logprobs(self.codec, tokens, shown) if scored and tokens else None,
            "finish_reason": piece.reason,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        if not self.fields.echo:
            return None
        return {"index": index, "text": self._echo(index)[0], "logprobs": None, "finish_reason": None}


class ChatCompletion(Completion):
    """`/v1/chat/completions`."""

    id_prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"
    fields: ChatRequest

    def start(self) -> None:
        """Write the conversation down as the model's template has it, and begin; raises `ApiError`."""
        fields, model = self.fields, self.engine.model
        if fields.top_logprobs and not fields.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true.", "top_logprobs")
        try:
            tokens = model.conversation([message.plain() for message in fields.messages])
        except UserError as error:
            raise ApiError(400, str(error), "messages") from error
        wanted = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
        self.prepare(
            [tokens],
            wanted,
            [*fields.stops, *model.template.stops],
            logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
        )

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        return chat_logprobs(self.codec, piece.tokens) if self.fields.logprobs else None

    def choice(self, index: int, text: str, piece: Piece, length: int) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.reason,
        }

    def delta(self, index: int, piece: Piece, shown: int) -> dict[str, Any]:
        content = {"content": piece.text} if piece.text else {}
        scored = self._logprobs(piece) if piece.tokens else None
        return {"index": index, "delta": content, "logprobs": scored, "finish_reason": piece.reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _json(value: Any) -> str:
    # a lone surrogate cannot be written as UTF-8; ASCII escapes can hold it
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Awaitable[Any], limit: float | None = None) -> Any:
    """The result of `work`, or None when the client left before, or after `limit` seconds; `work` is cancelled then."""
    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for one in (task, watcher):
            one.cancel()


class EventStream(Response):
    """Server-sent events until they end or the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], done: Callable[[], None], limit: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._done, self._limit = events, done, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in self._events:
                await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        try:
            await unless_gone(receive, write(), self._limit)
        finally:
            self._done()


async def respond(completion: TextCompletion | ChatCompletion, receive: Receive, metrics: Metrics) -> Response:
    """Start a completion and answer, as a stream or whole."""
    completion.start()
    if completion.fields.stream:
        # a reader that has stopped reading keeps its connection no longer than this
        limit = completion.timeout + 30
        return EventStream(completion.events(), lambda: completion.finish(metrics), limit)
    try:
        reply = await unless_gone(receive, completion.reply())
    finally:
        completion.finish(metrics)
    # nobody reads what a client that left would get
    return Response(status_code=400) if reply is None else Response(_json(reply), media_type="application/json")
