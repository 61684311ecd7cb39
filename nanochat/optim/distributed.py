"""One optimizer over several ranks: each parameter has an owner, which alone keeps its state and computes its update.

A step sends each gradient to its owner and each new weight from there to all (`reduce` and `broadcast`): as many bytes
as one all-reduce of the gradients, in a ring 2 (W - 1) / W of theirs for each rank, while the costly part of Muon, the
states of every rule and their refreshes exist once instead of W times. A tensor is never cut, so that a rule sees
what it would see on one rank. The idea: ZeRO's first stage (arXiv:1910.02054) by whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat import ranks

Update = Callable[[list[Tensor], list[Tensor], list[Tensor]], None]
"""(parameters of the optimizer, tensors to update in their place, gradients of these): a group's update"""
BUCKET_BYTES = 2**25
"""small tensors travel together, up to so many bytes"""
IN_FLIGHT = 4
"""buckets under way at a time, which bounds their memory"""


def assign(costs: Sequence[float], count: int) -> list[int]:
    """An owner for each cost: the dearest first, each to the rank that has the least to do so far."""
    loads, owners = [0.0] * count, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = min(range(count), key=lambda r: (loads[r], r))
        loads[owners[i]] += costs[i]
    return owners


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The L2 norm of all of them, in float32 at least."""
    if all(gradient.dtype != torch.bfloat16 for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))


class Bucket:
    """Tensors of one owner that travel as one.

    Args:
        owner: the rank whose values count.
        tensors: contiguous, of one dtype and device.
    """

    def __init__(self, owner: int, tensors: list[Tensor]) -> None:
        self.owner, self.tensors = owner, tensors
        alone = len(tensors) == 1 and tensors[0].is_contiguous()
        self.flat = tensors[0] if alone else torch.cat([tensor.reshape(-1) for tensor in tensors])
        self.work: dist.Work | None = None

    def reduce(self) -> None:
        """Begin to add the ranks' values up at the owner, those in bfloat16 in float32; elsewhere nothing of use is
        left."""
        if self.flat.dtype == torch.bfloat16:
            self.flat = self.flat.view(-1).float()
        self.work = dist.reduce(self.flat, self.owner, async_op=True)

    def broadcast(self) -> None:
        """Begin to send the owner's values to all."""
        self.work = dist.broadcast(self.flat, self.owner, async_op=True)

    def finish(self, receives: bool) -> None:
        """Wait; `receives`: put what has come into the tensors."""
        assert self.work is not None
        self.work.wait()
        if receives and self.flat is not self.tensors[0]:
            parts = self.flat.split([tensor.numel() for tensor in self.tensors])
            for tensor, part in zip(self.tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))


class Owners:
    """Who updates which parameter, and how gradients and weights get there and back.

    Args:
        groups: the parameters of each group.
        costs: of each parameter's update, in any unit.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], costs: Sequence[Sequence[float]]) -> None:
        self.rank, self.world = ranks.rank(), ranks.world()
        self.groups = [list(group) for group in groups]
        everyone = [parameter for group in self.groups for parameter in group]
        owners = assign([cost for group in costs for cost in group], self.world)
        self.of: dict[Tensor, int] = dict(zip(everyone, owners, strict=True))
        self.used: dict[Tensor, bool] = {}
        """whether a parameter has a gradient in this step, on any rank; empty before `reduce`"""
        self._sent: list[Bucket] = []

    def mine(self, parameter: Tensor) -> bool:
        """Whether this rank updates a parameter, alone, and has its whole state."""
        return self.of[parameter] == self.rank

    def first(self, parameter: Tensor) -> int:
        """The place, in a whole parameter, of the first element that this rank updates."""
        return 0

    @torch.no_grad()
    def reduce(self) -> None:
        """Make each gradient the mean over the ranks, at its owner; elsewhere it is freed. Once a step."""
        if self.used:
            return
        flags = torch.tensor([p.grad is not None for p in self.of], dtype=torch.uint8)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        self.used = dict(zip(self.of, map(bool, flags.tolist()), strict=True))
        waiting: list[tuple[Bucket, list[Tensor]]] = []

        def arrive() -> None:
            bucket, parameters = waiting.pop(0)
            mine = bucket.owner == self.rank
            bucket.finish(mine)
            for parameter in parameters:
                parameter.grad = parameter.grad.div_(self.world) if mine and parameter.grad is not None else None

        for group in self.groups:
            for owner, parameters in self._parts(group):
                for parameter in parameters:
                    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    parameter.grad = gradient.contiguous()
                bucket = Bucket(owner, [p.grad for p in parameters if p.grad is not None])
                bucket.reduce()
                waiting.append((bucket, parameters))
                if len(waiting) == IN_FLIGHT:
                    arrive()
        while waiting:
            arrive()

    def gradient_norm(self) -> Tensor:
        """The L2 norm of the mean gradients, which are at their owners then."""
        self.reduce()
        gradients = [ranks.own_part(p.grad) for p in self.of if p.grad is not None]
        one = next(iter(self.of))
        square = torch.zeros((), dtype=torch.float64, device=one.device)
        if gradients:
            square += total_norm(gradients).double().square()
        return ranks.add(square).sqrt().to(torch.promote_types(one.dtype, torch.float32))

    @torch.no_grad()
    def update(self, group: int, update: Update) -> None:
        """Update the parameters of a group that are this rank's, and begin to send all of its new weights."""
        used = [p for p in self.groups[group] if p.grad is not None]
        update(used, used, [p.grad for p in used if p.grad is not None])
        for owner, parameters in self._parts(self.groups[group]):
            bucket = Bucket(owner, [p.detach() for p in parameters])
            bucket.broadcast()
            self._sent.append(bucket)
            if len(self._sent) == IN_FLIGHT:
                self._receive()

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for the weights; the step is over."""
        while self._sent:
            self._receive()
        # what is kept of a weight until it changes (its trits) goes by its version
        torch.autograd.graph.increment_version([p for p, used in self.used.items() if used])
        self.used = {}

    def _receive(self) -> None:
        bucket = self._sent.pop(0)
        bucket.finish(bucket.owner != self.rank)

    def _parts(self, group: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """(owner, parameters) of the buckets of a group, in the same order on every rank."""
        for owner in range(self.world):
            part: list[Tensor] = []
            size = 0
            for parameter in group:
                if self.of[parameter] != owner or not self.used[parameter]:
                    continue
                own = parameter.numel() * parameter.element_size()
                if part and (size + own > BUCKET_BYTES or parameter.dtype != part[0].dtype):
                    yield owner, part
                    part, size = [], 0
                part.append(parameter)
                size += own
            if part:
                yield owner, part


def scatter_rows(whole: Tensor | None, own: Tensor, counts: Sequence[int]) -> None:
    """Give each rank its rows of a tensor that rank 0 has.

    Args:
        whole: on rank 0.
        own: this rank's rows, which are written.
        counts: of rows, by ranks.
    """
    if whole is None:
        if own.numel():
            received = torch.empty(own.shape, dtype=own.dtype)
            dist.recv(_bytes(received), 0)
            own.copy_(received)
        return
    for rank, rows in enumerate(whole.split(list(counts))):
        if rank == 0:
            own.copy_(rows)
        elif rows.numel():
            dist.send(_bytes(rows.cpu()), rank)


def gather_states(states: dict[str, dict], split: Container[str] = ()) -> dict[str, dict] | None:
    """The states of all ranks by parameter name, on the CPU of rank 0; None elsewhere.

    Args:
        states: this rank's: name -> tensors and numbers.
        split: names whose states are parts of a whole, one on each rank: the tensors are put together along their first
            dimension in the order of the ranks; numbers and tensors without a dimension are the same in all parts.
    """
    plan = {
        name: {
            key: (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
            for key, value in state.items()
        }
        for name, state in states.items()
    }
    plans: list[dict] | None = [{}] * ranks.world() if ranks.rank() == 0 else None
    dist.gather_object(plan, plans)
    if plans is None:
        for state in states.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    dist.send(_bytes(value.detach().cpu()), 0)
        return None
    found = dict(states)
    parts: dict[str, list[dict]] = {name: [state] for name, state in states.items() if name in split}
    for source, plan in enumerate(plans):
        for name, state in plan.items() if source else ():
            received = {key: _received(value, source) for key, value in state.items()}
            if name in split:
                parts.setdefault(name, []).append(received)
            else:
                found[name] = received
    for name in list(parts):
        found[name] = _joined(parts.pop(name))
    return found


def _joined(parts: list[dict]) -> dict:
    """One state of its parts, by ranks, which are freed on the way."""
    first = parts[0]
    for key, value in first.items():
        if isinstance(value, Tensor) and value.ndim:
            first[key] = torch.cat([part.pop(key).cpu() if part is not first else value.cpu() for part in parts])
    return first


def _received(planned: object, source: int) -> object:
    if not isinstance(planned, tuple) or not isinstance(planned[-1], torch.dtype):
        return planned
    shape, dtype = planned
    tensor = torch.empty(shape, dtype=dtype)
    dist.recv(_bytes(tensor), source)
    return tensor


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor."""
    return tensor.contiguous().view(-1).view(torch.uint8)
