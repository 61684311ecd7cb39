"""From a request of the scheduler to text that an asyncio task reads, and from its tokens to OpenAI's likelihoods."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat.inference.sampling import Sampling
from nanochat.inference.scheduler import Request, Token
from nanochat.inference.stream import StopStrings, TextStream
from nanochat.serve.codec import Codec
from nanochat.serve.engine import Engine
from nanochat.serve.errors import ApiError


@dataclass
class Piece:
    """What an answer has got since the last piece."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    prompt: list[Token] | None = None
    """the scored prompt, once"""
    reason: str | None = None
    """at the end: stop, length, cancelled or error"""
    message: str | None = None


class Answer:
    """One continuation.

    Made in the event loop's thread; the model's thread calls what it gives to `Request`.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: Sampling,
        seed: int,
        stops: Sequence[str],
        logprobs: int | None = None,
        score_prompt: bool = False,
    ) -> None:
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Piece]()
        self._stream, self._stops = TextStream(engine.model.codec.decode), StopStrings(stops)
        self._held: list[Token] = []  # tokens whose text is not certain yet
        self.engine, self.written = engine, 0
        self.first: float | None = None
        """when the first token came, on the clock of `Request.submitted`"""
        self.request = Request(
            prompt,
            max_tokens,
            sampling,
            seed,
            engine.model.codec.stop_ids,
            logprobs,
            score_prompt,
            on_token=self._on_token,
            on_prompt=lambda found: self._put(Piece(prompt=found)),
            on_end=self._on_end,
        )

    def _put(self, piece: Piece) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)

    def _on_token(self, token: Token) -> bool:
        self.written += 1
        if self.first is None:
            self.first = time.monotonic()
        self._held.append(token)
        text = self._stops.push(self._stream.push(token.id))
        if text or self._stops.stopped:
            held, self._held = self._held, []
            # a token that is part of a stop string is not part of the answer
            self._put(Piece(text, held[:-1] if self._stops.stopped else held))
        return self._stops.stopped

    def _on_end(self, reason: str, message: str | None) -> None:
        text = self._stops.push(self._stream.finish()) + self._stops.finish()
        self._put(Piece(text, self._held, reason=reason, message=message))

    async def pieces(self, timeout: float) -> AsyncIterator[Piece]:
        """The pieces as they come; the last one has a reason.

        Raises `ApiError` when the model failed, or after `timeout` seconds.
        """
        alarm = self._loop.call_later(timeout, self._queue.put_nowait, Piece(reason="timeout"))
        try:
            while True:
                piece = await self._queue.get()
                if piece.reason == "timeout":
                    raise ApiError(504, f"the answer took longer than {timeout:g} seconds.")
                if piece.reason == "error":
                    raise ApiError(500, piece.message or "the model failed.")
                if piece.reason == "cancelled":
                    raise ApiError(503, "the server is stopping.")
                yield piece
                if piece.reason:
                    return
        finally:
            alarm.cancel()

    def cancel(self) -> None:
        """End the request if it has not ended."""
        self.engine.cancel(self.request)


def token_text(codec: Codec, token: int) -> str:
    """A token's text; one that is not whole characters as OpenAI writes it, `bytes:\\xf0\\x9f`."""
    data = codec.piece(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(codec: Codec, tokens: Sequence[Token]) -> dict[str, Any]:
    """`logprobs` of a chat completion."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": token_text(codec, token), "logprob": logprob, "bytes": list(codec.piece(token))}

    return {
        "content": [
            {**entry(token.id, token.logprob), "top_logprobs": [entry(*one) for one in token.top]} for token in tokens
        ],
        "refusal": None,
    }


def completion_logprobs(codec: Codec, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    """`logprobs` of a completion; offset: characters of the text before these tokens."""
    texts = [token_text(codec, token.id) for token in tokens]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(codec.decode([token.id]))
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            {token_text(codec, one): logprob for one, logprob in token.top} if token.logprob is not None else None
            for token in tokens
        ],
        "text_offset": offsets,
    }
