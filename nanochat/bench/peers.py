"""Other projects beside ours: each is a clone that is imported in a process of its own, which trains on request.

So a package that is called `nanochat` like ours can be measured in the same run, round by round.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat.bench import peer_worker
from nanochat.bench.measure import paired_ratio, rounds, seconds
from nanochat.device import product_seconds
from nanochat.errors import UserError, did_you_mean
from nanochat.model import GPTConfig

DTYPES = ("float32", "bfloat16")
PACKAGE = {"litgpt": "litgpt/__init__.py", "karpathy": "nanochat/gpt.py"}
"""a file by which a clone is known"""
SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "seq_len", "tied")
OURS = "ours"
HOPELESS = 4.0
"""an arithmetic whose products take so many times those of float32 is nobody's best, and is left out"""


@dataclass(frozen=True)
class Peer:
    """A project and where its clone is."""

    name: str
    paths: tuple[str, ...]
    """the clone, then folders with packages that it needs"""

    @property
    def option(self) -> str:
        """As it was given."""
        return f"--peer {self.name}={os.pathsep.join(self.paths)}"


def peer(text: str) -> Peer:
    """Option type: NAME=PATH, with further folders for its imports after a colon (the system's path separator)."""
    name, _, value = text.partition("=")
    if name not in PACKAGE:
        raise argparse.ArgumentTypeError(f"there is no peer {name!r}{did_you_mean(name, PACKAGE)}")
    paths = [os.path.abspath(os.path.expanduser(part)) for part in value.split(os.pathsep) if part]
    if not paths:
        raise argparse.ArgumentTypeError(f"{text} must be {name}=PATH, the folder of its clone")
    for path in paths:
        if not os.path.isdir(path):
            raise argparse.ArgumentTypeError(f"{path} is not a folder")
    if not os.path.exists(os.path.join(paths[0], PACKAGE[name])):
        raise argparse.ArgumentTypeError(f"{paths[0]} is not a clone of {name}: it has no {PACKAGE[name]}")
    return Peer(name, tuple(paths))


def add_peer_option(parser: argparse.ArgumentParser, needed: bool = False) -> None:
    """`--peer`, as often as there are peers."""
    parser.add_argument(
        "--peer",
        type=peer,
        action="append",
        default=[],
        required=needed,
        metavar="NAME=PATH[:PATH]",
        help=f"a clone of {' or '.join(PACKAGE)} to compare with, and folders with packages that it needs",
    )


@functools.cache
def times_slower(dtype: str, device: str) -> float:
    """How many times as long a product takes as in float32, where that is not known beforehand: on CPUs."""
    if dtype == "float32" or device != "cpu":
        return 1.0
    return product_seconds(getattr(torch, dtype)) / product_seconds(torch.float32)


def arm_name(peer: Peer, dtype: str, compiled: bool) -> str:
    """As the tables call a peer in one arithmetic."""
    return f"{peer.name}, {dtype}, {'compiled' if compiled else 'eager'}"


@dataclass(frozen=True)
class Load:
    """What every arm trains: the shape of the network and of a step."""

    config: GPTConfig
    batch: int
    """sequences of a micro-batch"""
    accumulate: int
    device: str
    threads: int

    @property
    def tokens(self) -> int:
        """of one optimizer step"""
        return self.batch * self.accumulate * self.config.seq_len


class ArmFailed(Exception):
    """A peer could not do what it was asked for; its message is a sentence's end."""


class Arm:
    """A peer in one arithmetic, in a process of its own. Use it as a context manager.

    Raises:
        UserError: the peer cannot be imported.
        ArmFailed: it cannot be built here.
    """

    def __init__(self, peer: Peer, dtype: str, compiled: bool, load: Load) -> None:
        self.peer, self.dtype, self.compiled = peer, dtype, compiled
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        # -P: the folder of the script, which has our benches, is no place to import from
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(peer_worker.__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        spec = {
            "peer": peer.name,
            "paths": list(peer.paths),
            "shape": {name: getattr(load.config, name) for name in SHAPE},
            "dtype": dtype,
            "compile": compiled,
            "batch": load.batch,
            "accumulate": load.accumulate,
            "device": load.device,
            "threads": load.threads,
        }
        try:
            self.parameters: int = self.ask("open", **spec)["parameters"]
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """As the tables call it."""
        return arm_name(self.peer, self.dtype, self.compiled)

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """The worker's answer to a request."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead: no answer will come either
            self._process.stdin.write(json.dumps({request: arguments}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            last = [text for text in self._errors.read().splitlines() if text.strip()][-1:]
            raise ArmFailed(f"its process died{f' ({last[0].strip()[:200]})' if last else ''}")
        answer = json.loads(line)
        if answer.get("missing"):
            raise UserError(f"{self.peer.option}: it cannot be imported ({answer['error']}).")
        if "error" in answer:
            raise ArmFailed(answer["error"])
        return answer

    def seconds(self) -> float:
        """Of one optimizer step."""
        return self.ask("step")["seconds"]

    def close(self) -> None:
        """End the process; once is enough."""
        if self._errors.closed:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Arm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def open_arms(peers: Sequence[Peer], compiled: bool, load: Load) -> Iterator[tuple[list[Arm], dict[str, str]]]:
    """Every peer in every arithmetic (eager, and compiled too if asked for), warmed up by one step.

    Gives the arms that work, and name -> reason of those that do not. Raises `UserError` where a peer has none.
    """
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        arms: list[Arm] = []
        for one in peers:
            mine: list[Arm] = []
            for dtype in DTYPES:
                slower = times_slower(dtype, load.device)
                for mode in (False, True) if compiled else (False,):
                    if slower > HOPELESS:
                        failed[arm_name(one, dtype, mode)] = f"a product takes {slower:.0f} times as long as in float32"
                        continue
                    try:
                        arm = stack.enter_context(Arm(one, dtype, mode, load))
                        arm.seconds()
                        mine.append(arm)
                    except ArmFailed as error:
                        failed[arm_name(one, dtype, mode)] = str(error)
            if not mine:
                reason = next(reason for name, reason in failed.items() if name.startswith(f"{one.name}, "))
                raise UserError(f"{one.option}: no step of it ran ({reason}).")
            arms += mine
        yield arms, failed


def compare(
    ours: Callable[[], Any], parameters: int, peers: Sequence[Peer], compiled: bool, load: Load, repeats: int
) -> dict[str, Any]:
    """Tokens per second of our step and of each peer's, all arms once in every round.

    Args:
        ours: one optimizer step of ours; parameters: of our network.

    Returns:
        `arms`: name -> {parameters, tokens_per_second, ours_over_this: median over the rounds of their seconds over
        ours}; `best`: peer -> name of its fastest arm; `failed`: name -> reason.
    """
    with open_arms(peers, compiled, load) as (arms, failed):
        timed: dict[str, Callable[[], float]] = {OURS: lambda: seconds(ours), **{arm.name: arm.seconds for arm in arms}}
        try:
            taken = rounds(timed, repeats)
        except ArmFailed as error:
            raise UserError(f"a peer stopped in the middle of the measurement: {error}.") from error
        sizes = {OURS: parameters, **{arm.name: arm.parameters for arm in arms}}
        figures = {
            name: {
                "parameters": sizes[name],
                "tokens_per_second": load.tokens / statistics.median(times),
                "ours_over_this": paired_ratio(times, taken[OURS]),
            }
            for name, times in taken.items()
        }
        best = {
            one.name: max(
                (arm.name for arm in arms if arm.peer == one), key=lambda name: figures[name]["tokens_per_second"]
            )
            for one in peers
        }
    return {"tokens_per_step": load.tokens, "arms": figures, "best": best, "failed": failed}


def current_load(config: GPTConfig, batch: int, accumulate: int, device: torch.device) -> Load:
    """The load of a network on a device with this process's threads."""
    return Load(config, batch, accumulate, device.type, torch.get_num_threads())
