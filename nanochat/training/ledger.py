"""Counting memory: every tensor that lives, by what it is for, and the most that lived at a time."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.training.shapes import Shape, run_on_shapes

WEIGHTS, TRITS, GRADIENTS = "weights", "ternary copies", "gradients"
STATES, ACTIVATIONS, WORKSPACE = "optimizer state", "saved activations", "workspace"
KINDS = (WEIGHTS, TRITS, GRADIENTS, STATES, ACTIVATIONS, WORKSPACE)
"""what memory is for; workspace: all that is none of the others"""


class Ledger(TorchDispatchMode):
    """While it is entered, notes every storage that an operation of torch makes, until that is freed.

    What a kernel needs for itself while it runs is not seen. Views count once.

    Args:
        shapes_on: nothing is computed: every tensor is a `Shape` on this device.

    Attributes:
        held: bytes now, by kind.
        peak: bytes, by kind, when there were most in all since the start or the last `restart`.
    """

    def __init__(self, shapes_on: torch.device | None = None) -> None:
        super().__init__()
        self.shapes_on = shapes_on
        self.held: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._total = self._most = 0
        self._storages: dict[int, tuple[int, str, Any]] = {}  # address -> bytes, kind, what tells of its end

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.shapes_on is None:
            out = func(*args, **(kwargs or {}))
        else:
            out = run_on_shapes(func, args, kwargs or {}, self.shapes_on)
        for tensor in _tensors(out):
            self._note(tensor, WORKSPACE)
        return out

    def mark(self, kind: str, tensors: Iterable[Tensor | None], count: int = 1) -> None:
        """Say what some tensors are for; they need not be known yet.

        count: ranks that share them, which have as much of each: this one's part is counted.
        """
        for tensor in tensors:
            if tensor is None:
                continue
            self._note(tensor, kind, count)
            address = _storage(tensor)._cdata
            size, before, end = self._storages[address]
            own = -(-_storage(tensor).nbytes() // count)
            self._storages[address] = (own, kind, end)
            self.held[before] -= size
            self.held[kind] += own
            self._total += own - size

    def leave_out(self, tensors: Iterable[Tensor]) -> int:
        """Say that some tensors are in another memory; returns their bytes, which do not count here."""
        total = 0
        for tensor in tensors:
            self._note(tensor, WORKSPACE)
            address = _storage(tensor)._cdata
            size, kind, end = self._storages[address]
            self._storages[address] = (0, kind, end)
            self.held[kind] -= size
            self._total -= size
            total += size
        return total

    def restart(self) -> None:
        """Forget the peak."""
        self.peak, self._most = self.held.copy(), self._total

    @contextmanager
    def saving(self) -> Iterator[None]:
        """What autograd saves here is marked as activations, unless it is marked already."""

        def pack(tensor: Tensor) -> Tensor:
            entry = self._storages.get(_storage(tensor)._cdata)
            if entry is None or entry[1] == WORKSPACE:
                self.mark(ACTIVATIONS, [tensor])
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def _note(self, tensor: Tensor, kind: str, count: int = 1) -> None:
        storage = _storage(tensor)
        address = storage._cdata
        if address in self._storages:
            return
        size = -(-storage.nbytes() // count)
        self._storages[address] = (size, kind, weakref.ref(storage, lambda _: self._end(address)))
        self.held[kind] += size
        self._total += size
        if self._total > self._most:
            self._most, self.peak = self._total, self.held.copy()

    def _end(self, address: int) -> None:
        size, kind, _ = self._storages.pop(address)
        self.held[kind] -= size
        self._total -= size


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.inner.untyped_storage() if isinstance(tensor, Shape) else tensor.untyped_storage()


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, (tuple, list)):
        for one in out:
            yield from _tensors(one)
