"""`nanochat generate`: text from a checkpoint, in the terminal."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from nanochat.checkpoint import load_run
from nanochat.device import find_device
from nanochat.errors import UserError
from nanochat.inference.engine import encode_prompt, generate_tokens, inference_copy
from nanochat.inference.sampling import Sampling
from nanochat.inference.speculative import Speculator, heads_of


class TextStream:
    """Turns tokens into text as they come, holding back a character whose bytes are not all there yet.

    `decode` gives text with U+FFFD for bytes that are no UTF-8. Such a mark at the very end may still become
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


def pick_device(name: str) -> torch.device:
    """`auto`, or a device's name; raises `UserError` for one that this machine lacks."""
    try:
        device = find_device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used on this machine.") from error
    return device


def parser() -> argparse.ArgumentParser:
    """Options of `nanochat generate`."""
    options = argparse.ArgumentParser(prog="nanochat generate", description="Write text with a trained model.")
    options.add_argument("run", help="run folder (outputs/latest) or .ckpt file")
    options.add_argument("--prompt", default="", help="text to continue; - reads standard input")
    options.add_argument("--max-tokens", type=int, default=200, help="longest continuation (200)")
    options.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token (0.8)")
    options.add_argument("--top-k", type=int, default=0, help="draw from the k most likely tokens (0: all)")
    options.add_argument("--top-p", type=float, default=0.95, help="draw from the most likely tokens up to p (0.95)")
    options.add_argument("--seed", type=int, help="repeat a result (default: a new one each time)")
    options.add_argument("--count", type=int, default=1, help="continuations (1)")
    options.add_argument(
        "--speculative", action="store_true", help="draft with the heads of +mtp=on, verify with the network"
    )
    options.add_argument("--checkpoint", default="last", metavar="STEP", help="last, or a step that was kept")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    return options


def main(argv: Sequence[str]) -> int:
    """Run `nanochat generate`; raises `UserError` for what the user can mend."""
    options = parser().parse_args(argv)
    if options.count < 1:
        raise UserError(f"--count {options.count} must be at least 1.")
    if options.max_tokens < 1:
        raise UserError(f"--max-tokens {options.max_tokens} must be at least 1.")
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    # bytes that are no UTF-8 arrive as lone surrogates, which a tokenizer cannot take
    prompt = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    run = load_run(options.run, options.checkpoint, pick_device(options.device))
    tokenizer = run.tokenizer
    if tokenizer.vocab_size > run.config.vocab_size:
        raise UserError(
            f"{run.folder}/tokenizer.json has {tokenizer.vocab_size} tokens, more than the model's "
            f"{run.config.vocab_size}: they do not belong together."
        )
    ids = encode_prompt(tokenizer, prompt)
    if len(ids) > run.config.seq_len:
        note = f"note: the prompt has {len(ids)} tokens; the model sees the last {run.config.seq_len}."
        print(note, file=sys.stderr)
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    gpt, speculator = inference_copy(run.gpt), None
    if options.speculative:
        speculator = Speculator(gpt, heads_of(run), tokenizer.vocab_size)
        items = _one_by_one(speculator, ids, options, sampling, seed, tokenizer.eot_id)
    else:
        items = generate_tokens(
            gpt,
            [ids] * options.count,
            options.max_tokens,
            sampling,
            seed=seed,
            stop_id=tokenizer.eot_id,
            vocab_limit=tokenizer.vocab_size,
        )
    streams = [TextStream(tokenizer.decode) for _ in range(options.count)]
    texts = [""] * options.count
    if options.count == 1:
        _show(prompt)
    for item in items:
        for index, token in enumerate(item):
            text = "" if token is None else streams[index].push(token)
            texts[index] += text
            if options.count == 1:
                _show(text)
    if options.count == 1:
        _show(streams[0].finish() + "\n")
    else:
        for index, text in enumerate(texts):
            _show(f"--- {index + 1} of {options.count} (seed {seed + index}) ---\n")
            _show(f"{prompt}{text}{streams[index].finish()}\n")
    if speculator is not None:
        print(speculator.statistics, file=sys.stderr)
    return 0


def _one_by_one(
    speculator: Speculator,
    ids: list[int],
    options: argparse.Namespace,
    sampling: Sampling,
    seed: int,
    stop_id: int,
) -> Iterator[list[int | None]]:
    """The continuations one after the other, in the form of `generate_tokens`."""
    for index in range(options.count):
        for token in speculator.generate(ids, options.max_tokens, sampling, seed=seed + index, stop_id=stop_id):
            yield [token if row == index else None for row in range(options.count)]


def _show(text: str) -> None:
    # a terminal that is not UTF-8 must not stop the text half-way
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
