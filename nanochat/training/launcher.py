"""The processes of a run on several ranks: started, watched, and ended together.

`trainer.devices=N` starts N ranks below the process of the command line, which has found every problem, prepared the
data and locked the folder, and now waits (`run_ranks`). Under torchrun the ranks are there already: rank 0 goes the way
of any run and hands the others what they are to do (`lead`, `follow`).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from torch.distributed import FileStore, PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from nanochat import ranks
from nanochat.errors import UserError, print_error
from nanochat.run_lock import TRY_LATER
from nanochat.training.callbacks.signals import SIGNALS
from nanochat.training.failures import SilentRankError, is_lost

log = logging.getLogger(__name__)

JOB, RESULT, ERROR, LEFT, STORE = "job.pickle", "result.json", "error-{}.json", "left", "store"
LIFE = "NANOCHAT_LIFE"
SAVED = {128 + signal.SIGINT, 128 + signal.SIGTERM, TRY_LATER}
"""exit codes of a rank that a signal ended once the run was saved; the last one also of a rank that lost the others"""
AGAIN = "Start the run again with ckpt_path=auto: it goes on from its last checkpoint."
POLL = 0.1  # seconds between two looks at the ranks
GRACE = 10.0  # seconds in which the ranks that are left may say what is wrong with them
REPORT = 300.0  # seconds, beside `rank_timeout`, in which all have to end once one has: rank 0 writes the report


@dataclass
class Job:
    """What every rank of a run has to do."""

    plain: dict[str, Any]
    """the settled configuration"""
    folder: Path
    checkpoint: Path | None
    argv: list[str]
    hydra: Any = None
    """Hydra's own configuration, where it started the run"""

    @classmethod
    def here(cls, plain: dict[str, Any], folder: Path, checkpoint: Path | None) -> Job:
        """The job of this process' run."""
        hydra = HydraConfig.instance().cfg if HydraConfig.initialized() else None
        return cls(plain, Path(folder).absolute(), checkpoint, list(sys.argv), hydra)


class RankDiedError(UserError):
    """A rank has ended, and its job with it; started again, it may well come through."""

    exit_code = TRY_LATER


class RankFailedError(UserError):
    """A rank has raised an exception, whose traceback it has printed."""

    exit_code = 1


# ---- ranks of our own -----------------------------------------------------------------------------------------------


def run_ranks(job: Job, count: int) -> dict[str, float]:
    """Start the ranks of a job on this machine, wait for them, and return rank 0's metrics.

    Raises:
        RankDiedError: a rank was killed, or lost the others.
        RankFailedError: a rank raised an exception.
        UserError: what a rank raised, with its exit code.
        SystemExit: 130, 143 or 75, when a signal ended the run after it was saved.
    """
    with tempfile.TemporaryDirectory(prefix="nanochat-") as name:
        place = Path(name)
        (place / JOB).write_bytes(pickle.dumps(job))
        with _started(place, count) as (processes, received):
            codes = _wait(processes, place, ranks.timeout_of(job.plain).total_seconds() + REPORT)
        _raise_for(codes, place, received, [number for number in range(count) if number not in codes])
        return json.loads((place / RESULT).read_text())


@contextlib.contextmanager
def _started(place: Path, count: int) -> Iterator[tuple[list[subprocess.Popen], list[int]]]:
    """The ranks as processes, which do not outlive the block, and the signals of this one that they were passed."""
    read, write = os.pipe()  # its writing end closes with this process, however that ends
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
    path = os.pathsep.join(dict.fromkeys(entry or os.getcwd() for entry in sys.path))
    shared = {"WORLD_SIZE": str(count), LIFE: str(read), "OMP_NUM_THREADS": threads, "PYTHONPATH": path,
              "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # fmt: skip
    processes: list[subprocess.Popen] = []
    received: list[int] = []
    before: dict[int, Any] = {}

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    try:
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, pass_on) for number in SIGNALS}
        for number in range(count):
            own = {**os.environ, **shared, "RANK": str(number), "LOCAL_RANK": str(number)}
            command = [sys.executable, "-m", "nanochat.rank", str(place)]
            # a session of their own: a terminal's Ctrl-C would reach them twice
            processes.append(subprocess.Popen(command, env=own, pass_fds=(read,), start_new_session=True))
        yield processes, received
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        os.close(read)
        os.close(write)


def _wait(processes: list[subprocess.Popen], place: Path, patience: float = math.inf) -> dict[int, int]:
    """Exit codes by rank, as they ended; missing are those left GRACE seconds after a failure, or `patience` seconds
    after a rank that ended well."""
    codes: dict[int, int] = {}
    deadline, failed = math.inf, False
    while len(codes) < len(processes) and time.monotonic() < deadline:
        time.sleep(POLL)
        for number, process in enumerate(processes):
            if number not in codes and process.poll() is not None:
                codes[number] = process.returncode
                deadline = min(deadline, time.monotonic() + patience)
        if not failed and any(codes.values()) and not (place / LEFT).exists():
            deadline, failed = min(deadline, time.monotonic() + GRACE), True
    return codes


def _raise_for(codes: dict[int, int], place: Path, received: list[int], left: Sequence[int] = ()) -> None:
    """Raise what ended the ranks, unless all is well: the cause rather than its consequences for the others.

    left: ranks that had to be stopped.
    """
    failures = {number: code for number, code in codes.items() if code}
    if not failures:
        if left:
            raise RankDiedError(f"rank {left[0]} hangs: the others have ended, and it did not. {AGAIN}")
        return
    # a rank that was killed, then one with an error of its own, then those that a signal ended or that lost it
    number = min(failures, key=lambda rank: (failures[rank] == TRY_LATER, failures[rank] in SAVED, failures[rank] >= 0))
    if failures[number] == TRY_LATER:  # who has waited longest knows best
        number = next((rank for rank in failures if _said(place, rank).get("silent")), number)
    code, count = failures[number], len(codes)
    if (place / LEFT).exists() and code in SAVED:
        raise SystemExit(code)
    again = f"the others were stopped. {AGAIN}"
    if -code in received:  # before there was anything to save, or for the second time
        raise SystemExit(128 - code)
    if code < 0:
        raise RankDiedError(f"rank {number} was killed by {signal.Signals(-code).name}; {again}")
    if said := _said(place, number):
        hangs = f"rank {left[0]} hangs: " if left and said.get("silent") else ""
        error = UserError(hangs + said["text"])
        error.exit_code = code
        raise error
    if code == TRY_LATER:
        raise RankDiedError(f"rank {number} lost its connection to the others; {again}")
    raise RankFailedError(f"rank {number} of {max(count, number + 1)} failed; its traceback is above.")


def _said(place: Path, number: int) -> dict[str, Any]:
    """The sentence that a rank has left, as `text`; empty where it has not."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((place / ERROR.format(number)).read_text())
    return {}


# ---- ranks of torchrun ----------------------------------------------------------------------------------------------


def _store() -> Store:
    """Through which the ranks of torchrun find each other."""
    store, _, _ = next(iter(rendezvous("env://")))
    store.set_timeout(ranks.TIMEOUT * 48)  # rank 0 prepares the data first
    return store


def lead(job: Job) -> None:
    """Rank 0: hand the others their job. Where it finds a problem before, torchrun ends them."""
    store = _store()
    store.set("job", pickle.dumps(job))  # type: ignore[arg-type]
    enter(job.plain, store)


def follow() -> Job:
    """The other ranks: wait for the job."""
    store = _store()
    job: Job = pickle.loads(store.get("job"))
    enter(job.plain, store)
    return job


def enter(plain: dict[str, Any], store: Store) -> None:
    """Enter the process group of a job's ranks, on this rank's device; they find each other through `store`."""
    device = None
    if plain["trainer"]["accelerator"] in ("cuda", "gpu"):
        local, devices = int(os.environ["LOCAL_RANK"]), plain["trainer"]["devices"]
        device = devices[local] if isinstance(devices, list) else local
    ranks.join(PrefixStore("group", store), device, ranks.timeout_of(plain))


def store_at(place: Path, timeout: datetime.timedelta) -> Store:
    """Through which our own ranks find each other: a file, as a free port may be taken before they listen on it."""
    store = FileStore(str(place / STORE), int(os.environ["WORLD_SIZE"]))
    store.set_timeout(timeout)
    return store


# ---- a rank's own ---------------------------------------------------------------------------------------------------


def end_with_parent() -> None:
    """Let this process end when the one that has started it is gone, even if that was killed."""
    pipe = int(os.environ[LIFE])

    def watch() -> None:
        os.read(pipe, 1)  # returns when the other end closes
        os._exit(TRY_LATER)

    threading.Thread(target=watch, name="nanochat-parent", daemon=True).start()


def exit_code_of(error: Exception, place: Path | None) -> int:
    """Tell of a rank's exception, and return the exit code that it ends with.

    place: the job's folder, where our launcher looks for a sentence; None: say it on stderr.
    """
    if isinstance(error, UserError):
        if place is None:
            if ranks.rank() == 0:
                print_error(error)
        else:
            said = {"text": str(error), "silent": isinstance(error, SilentRankError)}
            (place / ERROR.format(os.environ["RANK"])).write_text(json.dumps(said))
        return error.exit_code
    if is_lost(error):
        sentence = str(error).strip().partition("\n")[0][:200]
        print_error(f"rank {os.environ['RANK']} lost its connection to the others: {sentence}")
        return TRY_LATER
    sys.excepthook(type(error), error, error.__traceback__)
    return 1
