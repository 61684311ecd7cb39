"""The ranks of a job: which one this process is, and what all of them agree on.

Where there is only one rank they cost a test. Numbers on the host travel over
gloo, tensors on a GPU over NCCL: `join` makes a process group that has both.
"""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from nanochat.console import duration

TIMEOUT = datetime.timedelta(minutes=30)
"""of a collective, unless `rank_timeout` says another: others wait while rank 0 saves or reports"""


def join(store: Store, cuda_device: int | None = None, timeout: datetime.timedelta = TIMEOUT) -> None:
    """Enter the process group that the environment describes.

    Args:
        store: through which the ranks find each other.
        cuda_device: index of this rank's GPU; None computes on the CPU.
        timeout: how long a rank waits for the others in a collective before that fails.
    """
    if dist.is_initialized():
        return
    backend = "gloo"
    if cuda_device is not None:
        torch.cuda.set_device(cuda_device)
        backend = "cpu:gloo,cuda:nccl"
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # until all are there, since one machine may start more slowly than a collective may take
    store.set(f"here-{number}", "")
    store.wait([f"here-{rank}" for rank in range(count)], max(timeout, TIMEOUT))
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=timeout)


def timeout_of(plain: dict[str, Any]) -> datetime.timedelta:
    """How long a rank of a settled configuration waits for the others."""
    limit = plain.get("rank_timeout")
    return TIMEOUT if limit is None else datetime.timedelta(seconds=duration(limit))


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def agreed(value: float) -> float:
    """The largest of the ranks' values: a decision that one of them makes is made by all.

    Every rank has to ask, at the same place of its program.
    """
    if world() == 1:
        return value
    largest = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def first(value: float) -> float:
    """Rank 0's value, such as that of its clock."""
    if world() == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(shared, 0)
    return shared.item()


def same(value: Any) -> Any:
    """Rank 0's value on every rank: numbers, text, lists and dictionaries of them."""
    if world() == 1:
        return value
    shared = [value]
    dist.broadcast_object_list(shared, 0)
    return shared[0]


def add(numbers: Tensor) -> Tensor:
    """The sum over the ranks, in place."""
    if world() > 1:
        dist.all_reduce(numbers)
    return numbers


def share(count: Tensor) -> Tensor:
    """A count of all ranks together, at least 1, over their number; with one rank the count, at least 1.

    A loss that each rank divides by it has, averaged over the ranks, the count of all in its denominator.
    """
    if world() == 1:
        return count.clamp_min(1)
    total = count.detach().to(torch.float32, copy=True)
    return add(total).clamp_min_(1.0).div_(world())


def gather(rows: Tensor) -> Tensor:
    """(W * B, ...): the rows (B, ...) of all ranks in their order, the same number of each."""
    if world() == 1:
        return rows
    own = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
    parts = own.new_empty(world(), *own.shape)
    dist.all_gather(list(parts), own.contiguous())
    return parts.flatten(0, 1).to(rows.dtype)


def own_part(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor that is sharded over the ranks (torch's DTensor); any other tensor itself.

    For code without gradients: what is written to the part is written to the tensor.
    """
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is sharded over the ranks, on each of them; every rank has to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined]


def own_rows(count: int) -> slice:
    """Which of the W * count rows of all ranks are this one's."""
    return slice(rank() * count, (rank() + 1) * count)


def own(index: Tensor, count: int) -> Tensor:
    """Of indices into the rows of all ranks those of this one, among its own `count` rows."""
    if world() == 1:
        return index
    rows = own_rows(count)
    return index[(index >= rows.start) & (index < rows.stop)] - rows.start
