"""Runs on several ranks for tests: processes that are forked once, enter one process group, and train job after job."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from nanochat import ranks
from nanochat.config.check import check
from nanochat.config.vocabulary import build_data, fit_vocabulary
from nanochat.rank import work
from nanochat.run import settle
from nanochat.training.launcher import Job
from nanochat.training.resume import check_resume, checkpoint_to_resume
from tests.runs import configure, read_metrics, read_state

ROWS = 4
"""of a micro-batch, on all ranks together"""


def job_of(place: Path, folder: Path, overrides: Sequence[str]) -> Job:
    """What `run.train` would hand its ranks."""
    plain = settle(check(configure(place, overrides)).values)
    data = build_data(plain)
    data.setup("fit")
    fit_vocabulary(plain, data)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = checkpoint_to_resume(folder, plain["ckpt_path"])
    if checkpoint is not None:
        check_resume(checkpoint, plain)
    return Job(plain, folder, checkpoint, ["test"])


def _serve(number: int, count: int, store: str, pipe: Connection) -> None:
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(count), MASTER_ADDR="", MASTER_PORT="")
    torch.set_num_threads(1)
    ranks.join(FileStore(store, count))
    while (job := pipe.recv()) is not None:
        try:
            pipe.send((job(), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


class Pool:
    """Ranks that wait for work."""

    def __init__(self, count: int, store: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["nanochat.rank", "tests.ranks.pools"])
        pipes = [context.Pipe() for _ in range(count)]
        self.pipes = [mine for mine, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(number, count, str(store), theirs), daemon=True)
            for number, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def call(self, *jobs: Any) -> list[Any]:
        """What each rank's job (or the one of all) returns; the first traceback is raised as an AssertionError."""
        for pipe, job in zip(self.pipes, jobs * len(self.pipes) if len(jobs) == 1 else jobs, strict=True):
            pipe.send(job)
        answers = [pipe.recv() for pipe in self.pipes]
        for number, (_, problem) in enumerate(answers):
            assert problem is None, f"rank {number}: {problem}"
        return [answer for answer, _ in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()


@contextmanager
def pool(count: int, store: Path) -> Iterator[Pool]:
    """A pool that ends with the block."""
    made = Pool(count, store)
    try:
        yield made
    finally:
        made.close()


class Train:
    """A run as a job for a pool.

    Args:
        before: a picklable function called first in each rank (it may patch what it likes until `undo` runs).
    """

    def __init__(self, job: Job, before: Callable[[pytest.MonkeyPatch], None] | None = None) -> None:
        self.job, self.before = job, before

    def __call__(self) -> dict[str, float] | int:
        """The metrics on rank 0; the exit code of a run that a signal has ended."""
        with pytest.MonkeyPatch.context() as patch:
            if self.before is not None:
                self.before(patch)
            try:
                return work(self.job)
            except SystemExit as end:
                return int(end.code or 0)


def train_on(
    ranks_: Pool | None,
    place: Path,
    folder: Path,
    overrides: Sequence[str],
    before: Callable[[pytest.MonkeyPatch], None] | None = None,
    batch: int | None = None,
) -> list[Any]:
    """Train in `folder` on the ranks of a pool, or in this process; returns what each rank returns.

    batch: rows of a rank's micro-batch; None: all ranks together have `ROWS`.
    """
    count = 1 if ranks_ is None else len(ranks_.pipes)
    job = job_of(place, folder, [*overrides, f"data.batch_size={batch or ROWS // count}", f"trainer.devices={count}"])
    return [Train(job, before)()] if ranks_ is None else ranks_.call(Train(job, before))


def numbers(folder: Path) -> dict[str, torch.Tensor]:
    """What runs are compared by: columns of metrics.csv, weights and optimizer states."""
    state, found = read_state(folder), {}
    for name in ("train/loss", "train/grad_norm", "val/loss", "optim/bytes", "skipped_steps"):
        column = [float(row[name]) for row in read_metrics(folder) if row.get(name)]
        found[name] = torch.tensor(column, dtype=torch.float64)
    found |= {f"weights {name}": value for name, value in state["state_dict"].items()}
    for name, one in state["optimizer_states"][0]["state"].items():
        found |= {f"state {name} {key}": torch.as_tensor(value) for key, value in one.items()}
    found["position"] = torch.tensor([state["DataModule"]["consumed"], state["DataModule"]["batch_size"]])
    return found


def close(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Fail with all numbers of two runs that differ by more, relatively where they are large."""
    a, b = numbers(one), numbers(other)
    assert list(a) == list(b)
    apart = {}
    for name in a:
        assert a[name].shape == b[name].shape, name
        assert a[name].dtype == b[name].dtype, name
        first, second = a[name].double(), b[name].double()
        if not torch.allclose(first, second, tolerance, tolerance, equal_nan=True):
            apart[name] = (first - second).abs().max().item()
    assert not apart
