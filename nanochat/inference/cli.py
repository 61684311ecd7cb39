"""`nanochat generate`: text from a checkpoint, in the terminal."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Iterator, Sequence

import torch

from nanochat.console import Parser, count, count_or_zero, number
from nanochat.device import find_device
from nanochat.errors import UserError
from nanochat.export.open_run import open_run
from nanochat.inference.engine import encode_prompt, generate_tokens, inference_copy
from nanochat.inference.sampling import Sampling
from nanochat.inference.speculative import Speculator, heads_of
from nanochat.inference.stream import StopStrings, TextStream
from nanochat.zoo.store import RUN_HELP


def pick_device(name: str) -> torch.device:
    """`auto`, or a device's name; raises `UserError` for one that this machine lacks."""
    try:
        device = find_device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used on this machine.") from error
    return device


def add_sampling(options: argparse.ArgumentParser, top_p: float = 0.95) -> None:
    """The options of `Sampling`, without a logit bias."""
    options.add_argument("--temperature", type=number, default=0.8, help="0 takes the most likely token (0.8)")
    options.add_argument("--top-k", type=count_or_zero, default=0, help="draw from the k most likely tokens (0: all)")
    options.add_argument(
        "--top-p", type=number, default=top_p, help=f"draw from the most likely tokens up to p ({top_p})"
    )
    options.add_argument(
        "--min-p", type=number, default=0.0, help="leave out tokens less likely than p times the likeliest (0)"
    )
    options.add_argument(
        "--repetition-penalty", type=number, default=1.0, help="above 1: against tokens that stand there already (1)"
    )


def sampling_of(options: argparse.Namespace) -> Sampling:
    """The `Sampling` that the options of `add_sampling` describe; raises `UserError`."""
    return Sampling(
        options.temperature, options.top_k, options.top_p, options.min_p, repetition_penalty=options.repetition_penalty
    )


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
    options.add_argument(
        "--speculative", action="store_true", help="draft with the heads of +mtp=on, verify with the network"
    )
    options.add_argument("--checkpoint", default="last", metavar="STEP", help="last, or a step that was kept")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    return options


class _Text:
    """One continuation's text, cut before the first stop string."""

    def __init__(self, tokenizer, stops: Sequence[str]) -> None:
        self.stream, self.stops = TextStream(tokenizer.decode), StopStrings(stops)

    def push(self, token: int) -> str:
        return self.stops.push(self.stream.push(token))

    def finish(self) -> str:
        return self.stops.push(self.stream.finish()) + self.stops.finish()


def main(argv: Sequence[str]) -> int:
    """Run `nanochat generate`; raises `UserError` for what the user can mend."""
    options = parser().parse_args(argv)
    sampling = sampling_of(options)
    if options.run.endswith(".gguf"):
        raise UserError(f"generate reads runs; for a GGUF file use nanochat chat {options.run}, or nanochat serve.")
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    # bytes that are not UTF-8 arrive as lone surrogates, which a tokenizer cannot take
    prompt = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    run = open_run(options.run, options.checkpoint, pick_device(options.device))
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
    _write(items, prompt, [_Text(tokenizer, options.stop) for _ in range(options.count)], seed)
    if speculator is not None:
        print(speculator.statistics, file=sys.stderr)
    return 0


def _write(items: Iterator[list[int | None]], prompt: str, streams: Sequence[_Text], seed: int) -> None:
    """Print continuations: a single one as it comes, several when they are whole."""
    single = len(streams) == 1
    texts = [""] * len(streams)
    if single:
        show(prompt)
    for item in items:
        for index, token in enumerate(item):
            text = "" if token is None else streams[index].push(token)
            texts[index] += text
            if single:
                show(text)
        if all(stream.stops.stopped for stream in streams):
            break
    if single:
        show(streams[0].finish() + "\n")
        return
    for index, text in enumerate(texts):
        show(f"--- {index + 1} of {len(streams)} (seed {seed + index}) ---\n")
        show(f"{prompt}{text}{streams[index].finish()}\n")


def _one_by_one(
    speculator: Speculator,
    ids: list[int],
    options: argparse.Namespace,
    sampling: Sampling,
    seed: int,
    stop_id: int,
) -> Iterator[list[int | None]]:
    """The continuations one after the other, in the form of `generate_tokens`."""
    if sampling.adjusts:
        raise UserError("--speculative does not work together with --repetition-penalty.")
    for index in range(options.count):
        for token in speculator.generate(ids, options.max_tokens, sampling, seed=seed + index, stop_id=stop_id):
            yield [token if row == index else None for row in range(options.count)]


def show(text: str) -> None:
    """Write to standard output at once; what its encoding lacks becomes a question mark."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
