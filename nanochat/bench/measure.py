"""What the benches share: fair timing with arms interleaved in one process, medians and ratios, and peak memory.

With one thread the clock is the process's CPU time, which a busy neighbour disturbs little; with more it is the wall
clock. Single figures drift between processes, ratios within one run do not.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from nanochat.config.compose import compose
from nanochat.config.schema import CONF
from nanochat.device import autocast, default_precision, find_device
from nanochat.model import GPTConfig
from nanochat.training.module import model_config

Arm = TypeVar("Arm", bound=Hashable)
Result = TypeVar("Result")


def network(preset: str, **changes: Any) -> GPTConfig:
    """The network of `model=PRESET`, with other values for some of its fields."""
    return replace(model_config(compose([f"model={preset}"])), **changes)


def presets() -> list[str]:
    """The names that `model=` takes."""
    return options_of("model")


def options_of(group: str) -> list[str]:
    """The options of a group of the configuration that stand on their own."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml") if path.stem != "base")


class Workplace:
    """Where the benches compute, and how precisely: as a run does by default."""

    def __init__(self) -> None:
        self.device = find_device()
        self.precision = default_precision(self.device)

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return autocast(self.device, self.precision)


def clock() -> float:
    """Seconds: CPU time of this process with one thread on a CPU, else the wall clock after the device is done."""
    device = find_device().type
    if device == "cpu":
        return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
    getattr(torch, device).synchronize()
    return time.perf_counter()


def seconds(function: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = clock()
    function()
    return clock() - start


def rounds(
    arms: Mapping[Arm, Callable[[], Result]], repeats: int, warm_up: int = 1, say: bool = False
) -> dict[Arm, list[Result]]:
    """What each arm gives in each round; in a round every arm runs once, so that drift hits all alike.

    Every other round runs backwards, so that what an arm leaves behind is not always the burden of the same one.

    say: tell on stderr after each round how far it is.
    """
    results: dict[Arm, list[Result]] = {name: [] for name in arms}
    start = time.monotonic()
    for turn in range(warm_up + repeats):
        for name in list(arms)[:: -1 if turn % 2 else 1]:
            result = arms[name]()
            if turn >= warm_up:
                results[name].append(result)
        if say:
            passed = time.monotonic() - start
            print(f"round {turn + 1} of {warm_up + repeats}, {passed:.0f} s", file=sys.stderr, flush=True)
    return results


def interleaved(arms: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1) -> dict[str, float]:
    """Median seconds of each arm, in turns as `rounds` takes them."""
    timed = {name: (lambda function=function: seconds(function)) for name, function in arms.items()}
    return {name: statistics.median(taken) for name, taken in rounds(timed, repeats, warm_up).items()}


def paired_ratio(arm: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds of arm / base: what slows the machine down for a while slows down both."""
    return statistics.median(a / b for a, b in zip(arm, base, strict=True))


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


def measures_memory() -> bool:
    """Whether `peak_extra_bytes` works here: on CUDA, and on Linux's CPUs."""
    return torch.cuda.is_available() or os.access("/proc/self/clear_refs", os.W_OK)


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


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"torch": str(torch.__version__), "device": device, "threads": torch.get_num_threads()}


def report(figures: dict[str, Any], as_json: bool) -> None:
    """Print the figures as JSON if that was asked for."""
    if as_json:
        print(json.dumps({**machine(), **figures}, indent=2))
