"""`nanochat bench serve`: time to first token and tokens per second of `nanochat serve`, by number of clients.

Closed loop: each client sends its next request when its last answer is complete. Open loop: requests arrive at random
times whatever is under way, at a share of the rate that the closed loop reached. Both go over HTTP to a server in a
process of its own; `alone` is the same backend driven in this process by one request, without HTTP.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanochat.bench.export import random_run
from nanochat.bench.measure import report
from nanochat.console import Parser, count, shares, some_of
from nanochat.export.gguf import export_gguf
from nanochat.inference import Request, Sampling, Scheduler, Token
from nanochat.reports.table import show
from nanochat.serve.client import Place, server_process, stream
from nanochat.serve.models import BACKENDS, SPECULATE, Settings, load_model


@dataclass
class Load:
    """What came back."""

    started: float = field(default_factory=time.monotonic)
    first: list[float] = field(default_factory=list)
    """seconds to the first token of each request"""
    whole: list[float] = field(default_factory=list)
    """seconds to the last one"""
    rates: list[float] = field(default_factory=list)
    """tokens per second of each answer, from its first token on"""
    tokens: int = 0
    failed: int = 0

    def row(self) -> dict[str, float]:
        """Percentiles in milliseconds, and tokens per second of all together."""
        taken = time.monotonic() - self.started
        return {
            "requests": len(self.whole),
            "failed": self.failed,
            "tokens_per_second": self.tokens / taken,
            "each": statistics.median(self.rates) if self.rates else 0.0,
            "first_p50": 1000 * percentile(self.first, 0.5),
            "first_p95": 1000 * percentile(self.first, 0.95),
            "whole_p50": 1000 * percentile(self.whole, 0.5),
            "whole_p95": 1000 * percentile(self.whole, 0.95),
        }


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which so large a share lies (nearest rank); 0 of none."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else 0.0


async def ask(place: Place, body: dict[str, Any], load: Load) -> None:
    """One request, counted."""
    start, first, last, tokens = time.monotonic(), None, 0.0, 0
    try:
        async for event in stream(place, "/v1/completions", body):
            if event["choices"] and event["choices"][0]["text"]:
                last = time.monotonic()
                first = first or last
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    except (OSError, ValueError):
        load.failed += 1
        return
    load.first.append((first or time.monotonic()) - start)
    load.whole.append(time.monotonic() - start)
    load.tokens += tokens
    if first is not None and last > first and tokens > 1:
        load.rates.append((tokens - 1) / (last - first))


def bodies(vocabulary: int, prompt: int, tokens: int, seed: int):
    """Endless requests of random tokens, none of which begins as another does; the end of a document is ruled out."""
    draw = random.Random(seed)
    while True:
        yield {
            "prompt": [draw.randrange(1, vocabulary) for _ in range(prompt)],
            "max_tokens": tokens,
            "temperature": 0,
            "logit_bias": {"0": -100, "256": -100},
            "stream_options": {"include_usage": True},
        }


async def closed(place: Place, clients: int, requests: int, source) -> Load:
    """So many clients, each with so many requests one after the other."""
    load = Load()

    async def client() -> None:
        for _ in range(requests):
            await ask(place, next(source), load)

    await asyncio.gather(*(client() for _ in range(clients)))
    return load


async def opened(place: Place, rate: float, requests: int, source, seed: int = 0) -> Load:
    """So many requests at random times, `rate` a second on average."""
    load, draw, tasks = Load(), random.Random(seed), []
    for _ in range(requests):
        tasks.append(asyncio.create_task(ask(place, next(source), load)))
        await asyncio.sleep(draw.expovariate(rate))
    await asyncio.gather(*tasks)
    return load


def alone(path: Path, backend: str, speculate: str, prompt: int, tokens: int) -> float:
    """Tokens per second of one request in this process, from its first token on."""
    model = load_model(path, Settings(backend, slots=1, speculate=speculate))
    times: list[float] = []

    def on_token(_: Token) -> bool:
        times.append(time.monotonic())
        return False

    scheduler = Scheduler(model.backend)
    body = next(bodies(256, prompt, tokens, 0))
    bias = tuple((int(token), value) for token, value in body["logit_bias"].items())
    for _ in range(2):  # the first one warms up
        times.clear()
        scheduler.submit(Request(body["prompt"], tokens, Sampling(0, logit_bias=bias), on_token=on_token))
        scheduler.run()
    model.backend.close()
    return (len(times) - 1) / (times[-1] - times[0])


def parser() -> Parser:
    """Options of `nanochat bench serve`."""
    options = Parser("bench serve", __doc__)
    options.add_argument("models", nargs="*", default=["tiny"], help="presets, run folders or .gguf files (tiny)")
    options.add_argument("--backends", type=some_of(BACKENDS), default=["torch", "llama.cpp"], help="torch,llama.cpp")
    options.add_argument(
        "--speculate", type=some_of(SPECULATE), default=["auto"], help="of the torch backend: auto,on,off (auto)"
    )
    options.add_argument("--clients", type=_counts, default=[1, 8, 64], help="closed loops to try (1,8,64)")
    options.add_argument("--open", type=shares, default=[0.5], help="open loops, by share of the closed rate (0.5)")
    options.add_argument("--requests", type=count, default=2, help="requests of each client (2)")
    options.add_argument("--prompt", type=count, default=64, help="tokens of a prompt (64)")
    options.add_argument("--tokens", type=count, default=64, help="tokens of an answer (64)")
    options.add_argument("--parallel", type=count, default=16, help="slots of the server (16)")
    options.add_argument("--threads", type=count, default=1, help="of the server (1)")
    return options


def _counts(text: str) -> list[int]:
    return [count(part) for part in text.split(",")]


def measure(path: Path, backend: str, speculate: str, options: Any) -> dict[str, dict[str, float]]:
    """Every load on one model with one backend."""
    rows: dict[str, dict[str, float]] = {}
    source = bodies(256, options.prompt, options.tokens, 1)
    arguments = [str(path), "--backend", backend, "--parallel", str(options.parallel)]
    arguments += ["--speculate", speculate]
    with server_process(arguments, options.threads) as place:
        asyncio.run(closed(place, 1, 1, source))  # warm-up
        reached = 0.0
        for clients in options.clients:
            load = asyncio.run(closed(place, clients, options.requests, source))
            row = rows[f"closed, {clients} clients"] = load.row()
            reached = max(reached, row["tokens_per_second"] / options.tokens)
        for share in options.open:
            requests = max(8, options.requests * max(options.clients) // 2)
            load = asyncio.run(opened(place, max(share * reached, 0.1), requests, source))
            rows[f"open, {share:.0%} of the rate"] = load.row()
    return rows


def _arms(backends: Sequence[str], speculate: Sequence[str]) -> list[tuple[str, str]]:
    """Each backend with each way to speculate; llama.cpp does not."""
    return [(backend, way) for backend in backends for way in (["auto"] if backend == "llama.cpp" else speculate)]


def main(argv: list[str]) -> int:
    """Print the table."""
    options = parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {}
    for name in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(name)
            if not path.exists():
                run = random_run(name, Path(scratch))
                path = Path(scratch) / f"{name}.gguf"
                export_gguf(run, path, "tq2_0" if run.config.ternary else "f16", mtp=False)
            for backend, speculate in _arms(options.backends, options.speculate):
                single = alone(path, backend, speculate, options.prompt, options.tokens)
                rows = measure(path, backend, speculate, options)
                arm = backend if speculate == "auto" else f"{backend}, speculate {speculate}"
                figures[f"{name}, {arm}"] = {"alone": single, **rows}
                if not options.json:
                    show(
                        f"{name} with {arm}, {options.parallel} slots, {options.threads} thread(s)",
                        ["load", "requests", "failed", "tokens/s", "tokens/s each", "first p50 ms", "first p95 ms",
                         "whole p50 ms", "whole p95 ms"],
                        [[load, *row.values()] for load, row in rows.items()],
                        [f"alone, without HTTP: {single:,.3g} tokens/s; prompts of {options.prompt} tokens, answers of "
                         f"{options.tokens}"],
                    )  # fmt: skip
    report(figures, options.json)
    return 0
