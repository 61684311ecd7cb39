"""`nanochat bench load`: a server under mixed load with faults, for as long as one likes.

Honest clients ask for greedy answers that are known, and check each; beside them clients leave in the middle, send what
is not a request, do not read, and are stopped and continued as processes. Afterwards: no answer was lost or mixed up,
the memory did not grow after the first third of the time, and the latency is back to what it was within a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from nanochat.bench.export import random_run
from nanochat.bench.measure import report
from nanochat.bench.serve import percentile
from nanochat.console import Parser, count, one_of, seconds
from nanochat.errors import UserError
from nanochat.export.gguf import export_gguf
from nanochat.reports.table import show
from nanochat.serve.client import Place, request, server_process, stream
from nanochat.serve.models import BACKENDS

PROMPTS = 8
TOKENS = 16  # of an honest answer
RUBBISH = (
    b"{",
    b"[]",
    b'{"prompt": 5}',
    b'{"prompt": "a", "max_tokens": -1}',
    b"\xff\xfe",
    b'{"prompt": "a", "n": 1e9}',
)
GROWTH = 1.10
SLACK = 24 << 20
"""memory may grow by so large a factor, or so many bytes, after the first third of the time"""


@dataclass
class Outcome:
    """What the clients saw."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    refused: int = 0
    """requests that the full queue sent away, which is no fault"""
    faults: Counter = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    """(seconds, resident bytes of the server)"""

    @property
    def growth(self) -> float:
        """Memory at the end over memory after the first third (medians of a few samples)."""
        third = len(self.memory) // 3
        if third < 1:
            return 1.0
        early = statistics.median(size for _, size in self.memory[third : third + 5])
        return statistics.median(size for _, size in self.memory[-5:]) / early

    @property
    def grew(self) -> bool:
        """Whether memory grew beyond what is allowed."""
        third = len(self.memory) // 3
        early = self.memory[third][1] if self.memory else 0
        return self.growth > GROWTH and self.memory[-1][1] - early > SLACK


def question(prompt: list[int]) -> dict[str, Any]:
    """A greedy request."""
    return {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logit_bias": {"0": -100, "256": -100}}


async def answer(place: Place, prompt: list[int]) -> str:
    """The text of a greedy answer."""
    events = stream(place, "/v1/completions", question(prompt))
    return "".join([event["choices"][0]["text"] async for event in events])


async def honest(place: Place, known: dict[tuple[int, ...], str], draw: random.Random, found: Outcome) -> None:
    """One known answer."""
    prompt = draw.choice(list(known))
    start = time.monotonic()
    try:
        text = await answer(place, list(prompt))
    except ConnectionError as error:
        if str(error) == "status 429":
            found.refused += 1
            await asyncio.sleep(0.05)
        else:
            found.lost.append(str(error))
        return
    except OSError as error:
        found.lost.append(str(error))
        return
    found.latencies.append(time.monotonic() - start)
    if text == known[prompt]:
        found.right += 1
    else:
        found.wrong.append(f"{text!r} instead of {known[prompt]!r}")


async def fault(place: Place, draw: random.Random, found: Outcome) -> None:
    """One client that does something wrong."""
    kind = draw.choice(("leaves", "rubbish", "does not read", "half a request", "leaves before the answer"))
    found.faults[kind] += 1
    body = {**question([draw.randrange(1, 256) for _ in range(8)]), "max_tokens": 100}
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        if kind == "rubbish":
            status, _ = await request(place, "POST", "/v1/completions", draw.choice(RUBBISH))
            if status >= 500:
                found.wrong.append(f"status {status} for rubbish")
        elif kind == "leaves":
            left = draw.randrange(1, 10)
            async for _ in stream(place, "/v1/completions", body):
                left -= 1
                if not left:
                    break
        else:
            _, writer = await asyncio.open_connection(place.host, place.port, limit=1024)
            data = json.dumps({**body, "stream": kind == "does not read"}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
            whole = f"{head}Content-Type: application/json\r\n\r\n".encode() + data
            writer.write(whole[: -len(data) // 2] if kind == "half a request" else whole)
            await asyncio.wait_for(writer.drain(), 1)
            await asyncio.sleep(draw.uniform(0.01, 0.5))
            writer.close()


def stopped_client(place: Place) -> None:
    """A process that asks until it is killed; its parent stops and continues it."""

    async def ask() -> None:
        while True:
            with contextlib.suppress(OSError):
                await answer(place, [7, 8, 9])
            await asyncio.sleep(0.02)

    asyncio.run(ask())


async def stop_and_continue(pid: int, end: float, draw: random.Random, found: Outcome) -> None:
    """Stop a process now and then."""
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end - 1.5:
            await asyncio.sleep(draw.uniform(0.2, 0.8))
            os.kill(pid, signal.SIGSTOP)
            found.faults["stopped process"] += 1
            await asyncio.sleep(draw.uniform(0.2, 1.0))
            os.kill(pid, signal.SIGCONT)


def resident(pid: int) -> int:
    """Resident memory of a process, bytes (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def load(
    place: Place, lasting: float, clients: int, stopped: BaseProcess, seed: int = 0
) -> tuple[Outcome, float, float]:
    """Run it; returns what was seen, and the latency of a lone request before and one second after."""
    draw, found = random.Random(seed), Outcome()
    known = {tuple(draw.randrange(1, 256) for _ in range(2 + 5 * index)): "" for index in range(PROMPTS)}
    for prompt in known:
        known[prompt] = await answer(place, list(prompt))
    before = await lone(place)
    end = time.monotonic() + lasting

    async def repeat(job, *arguments) -> None:
        while time.monotonic() < end:
            await job(place, *arguments, found)
            await asyncio.sleep(draw.uniform(0, 0.05))

    async def watch() -> None:
        while time.monotonic() < end:
            found.memory.append((lasting - end + time.monotonic(), resident(place.pid)))
            await asyncio.sleep(lasting / 60)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(repeat(honest, known, draw))
            tasks.create_task(repeat(fault, draw))
        tasks.create_task(watch())
        tasks.create_task(stop_and_continue(stopped.pid or 0, end, draw, found))
    stopped.kill()
    await asyncio.sleep(1.0)
    # a neighbour on the machine may disturb one of them
    return found, before, min([await lone(place) for _ in range(3)])


async def lone(place: Place) -> float:
    """Seconds of a lone answer, the median of five."""
    times = []
    for index in range(5):
        start = time.monotonic()
        await answer(place, [11, 12, 13 + index])
        times.append(time.monotonic() - start)
    return statistics.median(times)


def parser() -> Parser:
    """Options of `nanochat bench load`."""
    options = Parser("bench load", __doc__)
    options.add_argument("model", nargs="?", default="tiny", help="preset, run folder or .gguf file (tiny)")
    options.add_argument("--seconds", type=seconds, default=600.0, help="how long (600)")
    options.add_argument("--clients", type=count, default=8, help="honest ones, and as many others (8)")
    options.add_argument("--backend", type=one_of(BACKENDS), default="auto", help="torch, llama.cpp or auto (auto)")
    options.add_argument("--parallel", type=count, default=8, help="slots of the server (8)")
    return options


def main(argv: list[str]) -> int:
    """Print what was seen: 0 when all is well, 1 otherwise."""
    options = parser().parse_args(argv)
    if not Path("/proc/self/statm").exists():
        raise UserError("bench load reads the server's memory from /proc, which this system does not have.")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(options.model)
        if not path.exists():
            run = random_run(options.model, Path(scratch))
            path = Path(scratch) / "model.gguf"
            export_gguf(run, path, "tq2_0" if run.config.ternary else "f16", mtp=False)
        arguments = [str(path), "--backend", options.backend, "--parallel", str(options.parallel)]
        with server_process(arguments) as place:
            context = multiprocessing.get_context("spawn")
            client = context.Process(target=stopped_client, args=(place,), daemon=True)
            client.start()
            try:
                found, before, after = asyncio.run(load(place, options.seconds, options.clients, client))
            finally:
                client.kill()
                client.join()
    figures = {
        "right": found.right,
        "wrong": len(found.wrong),
        "lost": len(found.lost),
        "refused": found.refused,
        "faults": dict(found.faults),
        "examples": [*found.wrong[:3], *found.lost[:3]],
        "memory_growth": found.growth,
        "answers_per_second": found.right / options.seconds,
        "latency_by_rate_ms": 1000 * options.clients * options.seconds / max(found.right, 1),
        "latency_p50_ms": 1000 * percentile(found.latencies, 0.5),
        "latency_p95_ms": 1000 * percentile(found.latencies, 0.95),
        "lone_before_ms": 1000 * before,
        "lone_after_ms": 1000 * after,
    }
    passed = found.right > 0 and not found.wrong and not found.lost and not found.grew and after < 3 * before + 0.1
    if not options.json:
        rows = [
            [name.replace("_", " "), value] for name, value in figures.items() if name not in ("faults", "examples")
        ]
        rows += [[f"fault: {name}", times] for name, times in found.faults.items()]
        notes = [
            *figures["examples"],
            "latency by rate: honest clients over answers per second, what each waits when all wait alike",
            "a p95 near it is a server at its limit, a much longer one would be unfair to some",
        ]
        notes.append("all is well." if passed else "NOT WELL.")
        show(f"{options.seconds:g} seconds of load with faults", ["what", "figure"], rows, notes)
    report({**figures, "passed": passed}, options.json)
    return 0 if passed else 1
