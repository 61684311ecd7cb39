"""Tokens to text while they come: whole characters only, and an end at stop strings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


class TextStream:
    """Turns tokens into text as they come, holding back a character whose bytes are not all there yet.

    `decode` gives text with U+FFFD for bytes that are not UTF-8. Such a mark at the very end may still become
    a character; everything before it is final.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode = decode
        self.tokens: list[int] = []
        self.shown = 0  # characters of `tokens` that were given out

    def push(self, token: int) -> str:
        """The text that has become certain with this token."""
        self.tokens.append(token)
        text = self.decode(self.tokens)
        final = text.removesuffix("\ufffd")
        new = final[self.shown :]
        self.shown = len(final)
        if final == text:
            self.tokens, self.shown = [], 0
        return new

    def finish(self) -> str:
        """What was held back, as it is."""
        rest = self.decode(self.tokens)[self.shown :] if self.tokens else ""
        self.tokens, self.shown = [], 0
        return rest


class StopStrings:
    """Cuts a text that comes in pieces before the first stop string, which may span pieces.

    What could still become a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [stop for stop in stops if stop]
        self.held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain to stand before any stop string; sets `stopped` when one is complete."""
        if self.stopped:
            return ""
        text = self.held + text
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back."""
        rest, self.held = self.held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def show(text: str) -> None:
    """Write to standard output at once; what its encoding lacks becomes a question mark."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
