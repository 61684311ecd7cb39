"""What the benches share: their options, and fair timing with arms interleaved in one process, medians and ratios.

With one thread the clock is the process's CPU time, which a busy neighbour disturbs little; with more it is the wall
clock. Single figures drift between processes, ratios within one run do not.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table

from nanochat.errors import UserError
from nanochat.messages import did_you_mean


class Parser(argparse.ArgumentParser):
    """A command's options, with `--json`; a mistake is a `UserError` of one sentence (exit code 2).

    Args:
        verb: the words after `nanochat`.
        description: what `--help` says first.
        repeats: default of `--repeats`; None leaves out the options of a timing, `--repeats` and `--threads`.
    """

    def __init__(self, verb: str, description: str | None, repeats: int | None = None) -> None:
        super().__init__(prog=f"nanochat {verb}", description=description, allow_abbrev=False)
        if repeats is not None:
            self.add_argument("--repeats", type=count, default=repeats, help=f"rounds of each arm ({repeats})")
            self.add_argument("--threads", type=count, default=1, help="threads of torch (1)")
        self.add_argument("--json", action="store_true", help="print the figures as JSON")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}{'' if message.endswith(('.', '?')) else '.'}")


def count(text: str) -> int:
    """Option type: a whole number of at least 1."""
    return _whole(text, 1)


def count_or_zero(text: str) -> int:
    """Option type: a whole number of at least 0."""
    return _whole(text, 0)


def _whole(text: str, low: int) -> int:
    # more than 64 bits would not fit what torch makes of it
    if not text.isascii() or not text.isdigit() or not low <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least {low}")
    return int(text)


def duration(text: str) -> float:
    """Option type: seconds, more than 0."""
    value = _number(text)
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number of seconds above 0")
    return value


def shares(text: str) -> list[float]:
    """Option type: numbers in [0, 1) with commas between them."""
    values = [_number(part) for part in text.split(",")]
    if not all(0.0 <= value < 1.0 for value in values):
        raise argparse.ArgumentTypeError(f"{text} must be numbers from 0 to below 1 with commas between them")
    return values


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def one_of(known: Iterable[str]) -> Callable[[str], str]:
    """Option type: one of the names."""

    def check(name: str) -> str:
        if name not in known:
            raise argparse.ArgumentTypeError(f"there is no {name!r}{did_you_mean(name, known)}")
        return name

    return check


def some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Option type: names with commas between them, repeats left out."""
    check = one_of(known)
    return lambda text: list(dict.fromkeys(check(name) for name in text.split(",")))


def clock() -> float:
    """Seconds: CPU time of this process with one thread on a CPU, else the wall clock after the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    if torch.backends.mps.is_available():
        torch.mps.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(function: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = clock()
    function()
    return clock() - start


def interleaved(arms: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1) -> dict[str, float]:
    """Median seconds of each arm; in each round every arm runs once, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(warm_up + repeats):
        for name, function in arms.items():
            taken = seconds(function)
            if turn >= warm_up:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def _peak_in_child(function: Callable[..., Any], arguments: tuple, pipe: Any) -> None:
    torch.set_num_threads(1)
    pipe.send(function(*arguments))


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a fresh process, so that one arm's memory does not hide another's."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_peak_in_child, args=(function, arguments, sender))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        raise RuntimeError(f"the measuring process of {function.__name__} died.") from error
    finally:
        child.join()


def resident_bytes() -> int:
    """Resident memory of this process now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_resident_bytes() -> int:
    """Highest resident memory of this process since `reset_peak` (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell the peak of resident memory.")


def reset_peak() -> None:
    """Start a new peak of resident memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_extra_bytes(function: Callable[[], Any]) -> int:
    """Bytes by which a call raises the memory in use, at its peak, above what was in use before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # memory that was freed but kept would be used again without being seen
        libc.malloc_trim(0)
    reset_peak()
    before = resident_bytes()
    function()
    return peak_resident_bytes() - before


def show(title: str, columns: list[str], rows: list[list[Any]], notes: list[str] | None = None) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index > 0)
    for row in rows:
        table.add_row(*[f"{cell:,.3g}" if isinstance(cell, float) else str(cell) for cell in row])
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for note in notes or []:
        console.print(note, highlight=False)


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"torch": str(torch.__version__), "device": device, "threads": torch.get_num_threads()}


def report(figures: dict[str, Any], as_json: bool) -> None:
    """Print the figures as JSON if that was asked for."""
    if as_json:
        print(json.dumps({**machine(), **figures}, indent=2))
