"""Counting host syncs without a GPU: operations that would wait there for all work queued so far."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "repeat_interleave"}


class HostReads(TorchDispatchMode):
    """Notes the operators that read a tensor's value on the host, or whose result's shape depends on values.

    found: their names; places: who in the package asked, the innermost of its functions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.places: list[str] = []

    def seen(self, name: str) -> None:
        self.found.append(name)
        own = [f for f in traceback.extract_stack() if "/nanochat/" in f.filename.replace("\\", "/")]
        self.places.append(own[-1].name if own else "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        masked = name.startswith("index") and any(
            index is not None and index.dtype == torch.bool
            for indices in args
            if isinstance(indices, list | tuple)
            for index in indices
        )
        if name in READS or masked:
            self.seen(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads() -> Iterator[HostReads]:
    """What happens within."""
    mode = HostReads()
    with ExitStack() as stack:
        for name in ("tolist", "numpy", "cpu"):  # no operators
            method = getattr(torch.Tensor, name)

            def seen(self: torch.Tensor, *rest: Any, name: str = name, method: Any = method) -> Any:
                mode.seen(name)
                with mock.patch.object(mode, "seen"):  # tolist makes an operator a number
                    return method(self, *rest)

            stack.enter_context(mock.patch.object(torch.Tensor, name, seen))
        stack.enter_context(mode)
        yield mode
