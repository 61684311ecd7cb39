"""`nanochat generate`: text from a trained model, in the terminal."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from nanochat.console import Parser, count
from nanochat.errors import UserError
from nanochat.inference.options import add_sampling, sampling_of
from nanochat.inference.sampling import Sampling
from nanochat.inference.scheduler import Request, Scheduler, Token
from nanochat.inference.stream import StopStrings, TextStream, show
from nanochat.serve.cli import add_loading, settings_of
from nanochat.serve.models import Model, load_model
from nanochat.zoo.store import RUN_HELP

MOST_SLOTS = 8
"""continuations written at once"""


def parser() -> Parser:
    """Options of `nanochat generate`."""
    options = Parser("generate", "Write text with a trained model.", as_json=False)
    options.add_argument("run", help=RUN_HELP)
    options.add_argument("--prompt", default="", help="text to continue; - reads standard input")
    options.add_argument("--max-tokens", type=count, default=200, help="longest continuation (200)")
    add_sampling(options)
    options.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given again"
    )
    options.add_argument("--seed", type=int, help="repeat a result (default: a new one each time)")
    options.add_argument("--count", type=count, default=1, help="continuations (1)")
    add_loading(options, None, "torch for what nanochat wrote, llama.cpp for other files")
    return options


class Continuations:
    """Writes the text of one or several continuations: a single one as it comes, several when they are whole."""

    def __init__(self, decode: Callable[[list[int]], str], prompt: str, count: int, stops: Sequence[str]) -> None:
        self.prompt = prompt
        self.streams = [TextStream(decode) for _ in range(count)]
        self.stops = [StopStrings(stops) for _ in range(count)]
        self.texts = [""] * count
        if count == 1:
            show(prompt)

    def push(self, index: int, token: int) -> bool:
        """Take a token of a continuation; returns whether a stop string has ended it."""
        self._write(index, self.stops[index].push(self.streams[index].push(token)))
        return self.stops[index].stopped

    def _write(self, index: int, text: str) -> None:
        self.texts[index] += text
        if len(self.texts) == 1:
            show(text)

    def finish(self, seed: int) -> None:
        """Write what is left; the first continuation was drawn with `seed`, the next ones with the next numbers."""
        for index, (stream, stops) in enumerate(zip(self.streams, self.stops, strict=True)):
            self._write(index, stops.push(stream.finish()) + stops.finish())
        if len(self.texts) == 1:
            show("\n")
            return
        for index, text in enumerate(self.texts):
            show(f"--- {index + 1} of {len(self.texts)} (seed {seed + index}) ---\n{self.prompt}{text}\n")


def main(argv: Sequence[str]) -> int:
    """Run `nanochat generate`; raises `UserError` for what the user can mend."""
    options = parser().parse_args(argv)
    sampling = sampling_of(options)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    # bytes that are not UTF-8 arrive as lone surrogates, which a tokenizer cannot take
    prompt = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    # drafts are for one continuation at a time
    slots = 1 if options.speculate == "on" else min(options.count, MOST_SLOTS)
    model = load_model(options.run, replace(settings_of(options), slots=slots, own_first=True))
    try:
        _continue(model, options, prompt, sampling, seed)
    finally:
        model.backend.close()
    return 0


def _continue(model: Model, options: argparse.Namespace, prompt: str, sampling: Sampling, seed: int) -> None:
    codec, failures = model.codec, []
    ids = [*codec.begin, *codec.encode(prompt)]
    if not ids:
        raise UserError("this model begins a text with no token of its own: give it a --prompt.")
    _note_length(ids, model.backend.context)
    scheduler = Scheduler(model.backend)
    texts = Continuations(codec.decode, prompt, options.count, options.stop)

    def request(index: int) -> Request:
        def on_token(token: Token) -> bool:
            return texts.push(index, token.id)

        def on_end(reason: str, message: str | None) -> None:
            if reason == "error":
                failures.append(message or "the model failed.")

        return Request(
            ids,
            options.max_tokens,
            sampling,
            seed + index,
            codec.stop_ids,
            slide=True,
            on_token=on_token,
            on_end=on_end,
        )

    for index in range(options.count):
        scheduler.submit(request(index))
    while scheduler.busy and not failures:
        scheduler.step()
    if failures:
        raise UserError(failures[0])
    texts.finish(seed)
    if options.speculate == "on":
        print(scheduler.drafting, file=sys.stderr)


def _note_length(ids: Sequence[int], context: int) -> None:
    if len(ids) > context:
        print(f"note: the prompt has {len(ids)} tokens; the model sees the last {context}.", file=sys.stderr)
