"""How Lightning's checkpoints reach the disk and come back."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from nanochat import ranks
from nanochat.checkpoint import read_checkpoint
from nanochat.files import atomic_write


class WholeFileIO(CheckpointIO):
    """Writes a checkpoint aside, syncs and renames it; reads none whose checksums do not match.

    A plugin of the Trainer, so that `Trainer.save_checkpoint` and `fit(ckpt_path=...)` use it. Given a `Writer` as
    `storage_options`, a save returns as soon as the writer has its copy.

    Raises:
        OSError, RuntimeError: the file cannot be written (torch makes a RuntimeError of a failed write).
        UserError: the file cannot be read, see `read_checkpoint`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if isinstance(storage_options, Writer):
            storage_options.take(checkpoint, Path(path))
        else:
            write(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        # several ranks had better not have a copy each; what outlives the file then keeps its pages, where ranks run. A
        # single one's optimizer keeps tensors of it, and the file is removed one day
        return read_checkpoint(path, mmap=ranks.world() > 1)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; `path` is the old file or the whole new one at every moment."""
    with atomic_write(path) as file:
        torch.save(checkpoint, file)


class Writer:
    """Writes checkpoints in a thread of its own, one at a time and in their order.

    Args:
        then: called in that thread with the path of each file once it is whole.

    A save waits for the one before it, so that there is one copy in memory at most. What goes wrong in the thread is
    raised by the next call of `take`, `check` or `wait`.
    """

    def __init__(self, then: Callable[[Path], None]) -> None:
        self.then = then
        self.seconds = 0.0
        """how long the last file took"""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def take(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Copy a checkpoint, and write it while training goes on."""
        self.wait()
        copied = snapshot(checkpoint)
        self._thread = threading.Thread(target=self._work, args=(copied, path), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when everything is on disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what went wrong since the last call, if anything did."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self, checkpoint: dict[str, Any], path: Path) -> None:
        start = time.monotonic()
        try:
            write(checkpoint, path)
            self.then(path)
        except BaseException as error:
            self._error = error
        self.seconds = time.monotonic() - start


def snapshot(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A copy in the CPU's memory that nothing shares with the run; tensors that share memory do so in the copy.

    Views keep their whole storage, as `torch.save` does: the file is the same as that of the original.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, Any] = {}
    for tensor in _tensors(checkpoint):
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = storage.clone() if storage.device.type == "cpu" else storage.cpu()
        held = torch.empty(0, dtype=tensor.dtype)
        held.set_(storages[storage._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())
        copies[id(tensor)] = held
    return copy.deepcopy(checkpoint, copies)  # what is in `copies` is taken from there


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
