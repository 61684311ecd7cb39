"""One optimizer over sharded parameters (torch's `fully_shard`): each rank has consecutive rows of every one.

What a rule does element by element, each rank does on its own rows. Whole matrices, as Muon and GaLore need them, go to
an owner: in rounds, in each of which every owner is sent the parts of the gradients and weights of some of its
parameters (one all-to-all), updates them, and sends the new rows back (another one). No rank ever holds more than a
round's, and a rule sees what it would see on one rank. The idea: dion's and torchtitan's Muon under FSDP2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat import ranks
from nanochat.optim.distributed import BUCKET_BYTES, Owners, Update


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is cut into rows, one part on each rank."""
    return hasattr(parameter, "to_local")


def part_shapes(parameter: Tensor, count: int) -> list[torch.Size]:
    """The shapes of the ranks' rows as `fully_shard` cuts them: equal ones; the last may have fewer rows or none."""
    rows, rest = parameter.shape[0], parameter.shape[1:]
    size = -(-rows // count)
    return [torch.Size((max(0, min(size, rows - rank * size)), *rest)) for rank in range(count)]


class Round:
    """Parameters that travel to their owners together, and back.

    Args:
        parameters: of each owner, by ranks; with a gradient.
    """

    def __init__(self, parameters: Sequence[Sequence[Tensor]]) -> None:
        self.rank, self.world = ranks.rank(), ranks.world()
        self.parameters = parameters
        self.mine = list(parameters[self.rank])
        self.shapes = [part_shapes(parameter, self.world) for parameter in self.mine]
        self._arriving: tuple[dist.Work, Tensor, list[int], Tensor] | None = None

    def gather(self) -> None:
        """Begin to send this rank's rows of every gradient and weight to their owners."""
        rows = [[t for p in part for t in (_own_gradient(p), ranks.own_part(p))] for part in self.parameters]
        self._exchange(rows, [2 * sum(shapes[rank].numel() for shapes in self.shapes) for rank in range(self.world)])

    def whole(self) -> tuple[list[Tensor], list[Tensor]]:
        """The weights and gradients of this owner's parameters."""
        arrived = self._wait()
        weights, gradients = [], []
        for parameter, shapes in zip(self.mine, self.shapes, strict=True):
            for whole in (gradients, weights):
                sizes = [shape.numel() for shape in shapes]
                pieces = [flat.split([size, len(flat) - size]) for flat, size in zip(arrived, sizes, strict=True)]
                whole.append(torch.cat([piece for piece, _ in pieces]).view(parameter.shape))
                arrived = [rest for _, rest in pieces]
        return weights, gradients

    def scatter(self, weights: Sequence[Tensor]) -> None:
        """Begin to send the rows of this owner's new weights to the ranks that have them."""
        by_weight = [w.split([shape[0] for shape in shapes]) for w, shapes in zip(weights, self.shapes, strict=True)]
        rows = [[parts[rank] for parts in by_weight] for rank in range(self.world)]
        self._exchange(rows, [sum(ranks.own_part(p).numel() for p in part) for part in self.parameters])

    def finish(self) -> None:
        """Wait for this rank's rows of the new weights."""
        for arrived, part in zip(self._wait(), self.parameters, strict=True):
            own = [ranks.own_part(parameter) for parameter in part]
            for rows, new in zip(own, arrived.split([rows.numel() for rows in own]), strict=True):
                rows.copy_(new.view_as(rows))

    def _exchange(self, tensors: Sequence[Sequence[Tensor]], receive: list[int]) -> None:
        """Begin to send some tensors to each rank; receive: elements that come from each."""
        send = [sum(tensor.numel() for tensor in part) for part in tensors]
        like = ranks.own_part(next(p for part in self.parameters for p in part))
        flat = torch.cat([like.new_empty(0), *(tensor.reshape(-1) for part in tensors for tensor in part)])
        out = like.new_empty(sum(receive))
        work = dist.all_to_all_single(out, flat, receive, send, async_op=True)
        self._arriving = (work, out, receive, flat)  # type: ignore[assignment]  # flat lives until it has been sent

    def _wait(self) -> list[Tensor]:
        """What has come, by ranks."""
        assert self._arriving is not None
        (work, out, receive, _), self._arriving = self._arriving, None
        work.wait()
        return list(out.split(receive))


def _own_gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return ranks.own_part(parameter.grad)


class Shards(Owners):
    """Who updates what of parameters that are sharded already, as are their gradients, which are means over the ranks.

    Args:
        groups: the parameters of each group.
        costs: of each parameter's update, in any unit.
        split: the parameters of which each rank updates its own rows.
    """

    def __init__(
        self, groups: Sequence[Sequence[Tensor]], costs: Sequence[Sequence[float]], split: Sequence[Tensor]
    ) -> None:
        self.split = set(split)
        for parameter in (parameter for group in groups for parameter in group):
            assert is_sharded(parameter)
        super().__init__(
            groups,
            [
                [0.0 if parameter in self.split else cost for parameter, cost in zip(group, own, strict=True)]
                for group, own in zip(groups, costs, strict=True)
            ],
        )

    def mine(self, parameter: Tensor) -> bool:
        return parameter not in self.split and super().mine(parameter)

    def first(self, parameter: Tensor) -> int:
        if parameter not in self.split:
            return 0
        return sum(shape.numel() for shape in part_shapes(parameter, self.world)[: self.rank])

    def reduce(self) -> None:
        """Note which parameters have a gradient: torch has added them up during the backward."""
        self.used = {parameter: parameter.grad is not None for parameter in self.of}

    @torch.no_grad()
    def update(self, group: int, update: Update) -> None:
        """Update a group: this rank's rows of the parameters that are split, and its own of the others."""
        used = [parameter for parameter in self.groups[group] if self.used[parameter]]
        split = [p for p in used if p in self.split and ranks.own_part(p).numel()]
        update(split, [ranks.own_part(p) for p in split], [_own_gradient(p) for p in split])
        leaving: Round | None = None
        coming = list(self._rounds([p for p in used if p not in self.split]))
        for i, one in enumerate(coming):
            if i == 0:
                one.gather()
            if i + 1 < len(coming):
                coming[i + 1].gather()  # while this one is computed
            weights, gradients = one.whole()
            update(one.mine, weights, gradients)
            if leaving is not None:
                leaving.finish()
            one.scatter(weights)
            leaving = one
        if leaving is not None:
            leaving.finish()

    def finish(self) -> None:
        """The step is over."""
        self.used = {}

    def _rounds(self, parameters: list[Tensor]) -> Iterator[Round]:
        """Some parameters in rounds of a bucket for each owner, all of one dtype."""
        for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
            same = [parameter for parameter in parameters if parameter.dtype == dtype]
            by_owner = [_buckets([p for p in same if self.of[p] == owner]) for owner in range(self.world)]
            for buckets in zip_longest(*by_owner, fillvalue=()):
                yield Round(buckets)


def _buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        own = parameter.numel() * parameter.element_size()
        if bucket and size + own > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += own
    if bucket:
        yield bucket
