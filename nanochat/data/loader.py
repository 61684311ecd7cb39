"""Batches ahead of their use: a thread makes them while the network works."""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import torch

from nanochat.data.dataset import Batch, Batches


class PrefetchLoader:
    """The endless sequence of micro-batches from a number on.

    It has no `state_dict` on purpose: Lightning reads ahead of training and would save the position of what was
    fetched. The position of what was *used* is the DataModule's.

    Args:
        batches: micro-batches by number.
        start: the number to begin with, asked for when an iterator is asked for its first batch.
        depth: batches that wait ready at most.
        device: a CUDA device: batches are put into pinned memory, from which they are copied in the background.
    """

    def __init__(
        self,
        batches: Batches,
        start: Callable[[], int] = lambda: 0,
        depth: int = 4,
        device: torch.device | None = None,
    ) -> None:
        self.batches, self.start, self.depth = batches, start, depth
        self.device = device if device is not None and device.type == "cuda" else None
        self.wait_seconds = 0.0
        """seconds that consumers have waited for batches, over all iterators"""

    def __iter__(self) -> Iterator[Batch]:
        return _Iterator(self)


class _Iterator:
    """Starts its thread with the first batch asked for, since Lightning makes iterators that it never uses."""

    def __init__(self, loader: PrefetchLoader) -> None:
        self._loader, self._next = loader, -1
        self._pid = os.getpid()
        self._ready: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
        self._free = threading.Semaphore(loader.depth)
        self._stop = threading.Event()
        self._finalizer: weakref.finalize | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        if self._next < 0:
            self._next = self._loader.start()
        # a fork has no thread and may have inherited locks in use, but batches are functions of their number
        if self._pid != os.getpid():
            batch: Batch | BaseException = self._loader.batches.batch(self._next)
        else:
            if self._finalizer is None:
                self._begin()
            batch = self._ready.get()
        self._loader.wait_seconds += time.perf_counter() - began
        if isinstance(batch, BaseException):
            self.close()
            self._ready.put(batch)  # whoever asks again gets the same answer
            raise batch
        if self._pid == os.getpid():
            self._free.release()
        self._next += 1
        return batch

    def close(self) -> None:
        """End the thread; also done when the iterator is dropped and when the interpreter ends."""
        if self._finalizer is not None:
            self._finalizer()

    def _begin(self) -> None:
        loader = self._loader
        # the thread knows nothing of the iterator, so that dropping the iterator can end the thread
        thread = threading.Thread(
            target=_produce,
            args=(loader.batches, self._next, loader.device, self._ready, self._free, self._stop),
            name="nanochat-prefetch",
            daemon=True,
        )
        self._finalizer = weakref.finalize(self, _end, thread, self._free, self._stop, self._pid)
        thread.start()


def _produce(
    batches: Batches,
    start: int,
    device: torch.device | None,
    ready: queue.SimpleQueue,
    free: threading.Semaphore,
    stop: threading.Event,
) -> None:
    try:
        if device is not None:
            torch.cuda.set_device(device)
        for index in itertools.count(start):
            free.acquire()
            if stop.is_set():
                return
            batch = batches.batch(index)
            ready.put(batch if device is None else {name: tensor.pin_memory() for name, tensor in batch.items()})
    except BaseException as error:
        ready.put(error)


def _end(thread: threading.Thread, free: threading.Semaphore, stop: threading.Event, pid: int) -> None:
    if pid != os.getpid():  # in a fork the thread is gone, and its locks may be held for ever
        return
    stop.set()
    free.release()
    thread.join()
