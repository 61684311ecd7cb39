"""`nanochat chat`: a conversation with a trained model in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from nanochat.console import Parser, count
from nanochat.errors import UserError
from nanochat.files import atomic_write
from nanochat.inference.options import add_sampling, sampling_of
from nanochat.inference.sampling import Sampling
from nanochat.inference.scheduler import Request, Scheduler, Token
from nanochat.inference.stream import StopStrings, TextStream, show
from nanochat.serve.cli import add_loading, settings_of
from nanochat.serve.models import Model, load_model
from nanochat.zoo.store import RUN_HELP

HELP = """/system TEXT   what the model is told before the conversation (empty: nothing)
/temp NUMBER   temperature of the next answers; 0 takes the most likely token
/regen         another answer to the last message
/new           a new conversation
/save FILE     write the conversation as JSON
/quit          leave (also Ctrl-D); Ctrl-C stops an answer"""


def parser() -> Parser:
    """Options of `nanochat chat`."""
    options = Parser("chat", "Talk to a trained model in the terminal.", as_json=False)
    options.add_argument("model", metavar="RUN_OR_FILE", help=RUN_HELP)
    options.add_argument("--system", default="", help="what the model is told before the conversation")
    options.add_argument("--max-tokens", type=count, default=256, help="longest answer (256)")
    add_sampling(options)
    options.add_argument("--seed", type=int, help="repeat a conversation (default: a new one each time)")
    add_loading(options, None)
    return options


class Conversation:
    """Messages, and a model that answers them.

    Args:
        model: with one slot or more; the first one keeps what was read.
        sampling: how its tokens are drawn.
        max_tokens: of an answer.
        seed: of the first answer; the next ones have the next numbers.
        system: a system prompt, none when empty.
    """

    def __init__(self, model: Model, sampling: Sampling, max_tokens: int, seed: int, system: str = "") -> None:
        self.model, self.sampling, self.max_tokens, self.system = model, sampling, max_tokens, system
        self.scheduler = Scheduler(model.backend)
        self.messages: list[dict[str, str]] = []
        self.seed = seed

    def _prompt(self) -> list[int]:
        """The conversation's tokens; its oldest messages are left out when there would be no room for an answer."""
        context = self.model.backend.context
        room = context - min(self.max_tokens, context // 2)
        system = [{"role": "system", "content": self.system}] if self.system else []
        for first in range(len(self.messages)):
            tokens = self.model.conversation([*system, *self.messages[first:]])
            if len(tokens) <= room:
                return tokens
        raise UserError(f"the message is too long: {room} tokens of the context of {context} are for messages.")

    def answer(self) -> tuple[int, float]:
        """Write the next answer to standard output and keep it; returns its tokens and tokens per second.

        An interrupt stops it, and keeps what is written. Raises `UserError` when the model cannot answer.
        """
        codec, failure = self.model.codec, []
        stream, stops = TextStream(codec.decode), StopStrings(self.model.template.stops)
        texts: list[str] = []
        times: list[float] = []

        def write(text: str) -> None:
            texts.append(text)
            show(text)

        def on_token(token: Token) -> bool:
            times.append(time.monotonic())
            write(stops.push(stream.push(token.id)))
            return stops.stopped

        request = Request(
            self._prompt(),
            self.max_tokens,
            self.sampling,
            self.seed,
            codec.stop_ids,
            on_token=on_token,
            on_end=lambda reason, message: failure.append(message) if reason == "error" else None,
        )
        self.seed += 1
        self.scheduler.submit(request)
        try:
            self.scheduler.run()
        except KeyboardInterrupt:
            request.cancelled = True
            self.scheduler.run()
        write(stops.push(stream.finish()) + stops.finish())
        if failure:
            raise UserError(failure[0] or "the model failed.")
        self.messages.append({"role": "assistant", "content": "".join(texts)})
        took = times[-1] - times[0] if times else 0.0
        return len(times), (len(times) - 1) / took if took > 0 else 0.0


class Terminal:
    """Reads lines and does what they say."""

    def __init__(self, conversation: Conversation, console: Console) -> None:
        self.conversation, self.console = conversation, console

    def say(self, text: str) -> None:
        """A line of ours, apart from the model's words."""
        self.console.print(f"[dim]{escape(text)}[/dim]", highlight=False)

    def answer(self) -> None:
        """An answer and how fast it came; a mistake is a line, and the conversation goes on."""
        try:
            written, speed = self.conversation.answer()
        except UserError as error:
            self.say(f"\nerror: {error}")
            return
        show("\n")
        self.say(f"{written} tokens{f', {speed:.1f} tokens/s' if speed else ''}")

    def command(self, line: str) -> bool:
        """Do what a line that begins with a slash says; returns whether to go on."""
        name, _, rest = line.partition(" ")
        rest, conversation = rest.strip(), self.conversation
        if name in ("/quit", "/exit", "/q"):
            return False
        if name == "/system":
            conversation.system = rest
            self.say("the system prompt is set." if rest else "there is no system prompt now.")
        elif name == "/temp":
            try:
                conversation.sampling = dataclasses.replace(conversation.sampling, temperature=float(rest))
            except (ValueError, UserError):
                self.say("/temp takes a number of at least 0.")
        elif name == "/new":
            conversation.messages.clear()
            self.say("a new conversation.")
        elif name == "/regen":
            if conversation.messages and conversation.messages[-1]["role"] == "assistant":
                conversation.messages.pop()
            if conversation.messages:
                self.answer()
            else:
                self.say("there is no message to answer yet.")
        elif name == "/save":
            self.save(rest)
        else:
            self.say(HELP)
        return True

    def save(self, path: str) -> None:
        """Write the conversation as JSON."""
        system = self.conversation.system
        messages = [{"role": "system", "content": system}] if system else []
        text = json.dumps({"messages": [*messages, *self.conversation.messages]}, indent=2, ensure_ascii=False)
        if not path:
            self.say("/save takes the name of a file.")
            return
        try:
            with atomic_write(Path(path).expanduser()) as file:
                file.write(text.encode())
        except (OSError, UserError) as error:
            self.say(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}.")
            return
        self.say(f"written to {path}.")

    def run(self) -> None:
        """Until /quit, or the end of the input."""
        interactive = sys.stdin.isatty()
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (gives `input` a history and keys)
        while True:
            try:
                line = input("\n> " if interactive else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                if interactive:
                    self.say("\n/quit leaves.")
                    continue
                raise
            line = line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            if line.startswith("/"):
                if not self.command(line):
                    return
            elif line:
                self.conversation.messages.append({"role": "user", "content": line})
                self.answer()


def main(argv: Sequence[str]) -> int:
    """Run `nanochat chat`; raises `UserError` for what the user can mend."""
    options: argparse.Namespace = parser().parse_args(argv)
    sampling = sampling_of(options)
    model = load_model(options.model, settings_of(options))
    try:
        seed = secrets.randbelow(2**31) if options.seed is None else options.seed
        terminal = Terminal(
            Conversation(model, sampling, options.max_tokens, seed, options.system), Console(stderr=True)
        )
        terminal.say(f"{model.name} with {model.backend.name}; /help lists what else there is.")
        if not model.is_chat:
            terminal.say("This is a base model: it was trained to continue text, not to answer.")
        terminal.run()
    finally:
        model.backend.close()
    return 0
