"""Batches from tokens. The order is a pure function of (seed, micro-batch number), whatever the speed of the reader."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nanochat.errors import UserError

IGNORED = -100
Batch = dict[str, Tensor]


class TrainSet(Protocol):
    """Rows of training tokens by number."""

    def row(self, number: int) -> np.ndarray:
        """(T + 1,) token ids of the row with this number; the numbers have no end."""
        ...


class Windows:
    """Training rows cut out of one long stream of tokens.

    Each epoch is a permutation of the windows of `seq_len` tokens, which begin at a shift that is drawn anew for every
    epoch; a window's last target is the first token of the next. So an epoch shows each token once, but for less
    than a window at either end.

    Args:
        tokens: (n,) ids.
        seq_len: T; raises `UserError` when the text is shorter than T + 1 tokens.
        seed: with the epoch's number, the whole randomness of the order.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int) -> None:
        if len(tokens) < seq_len + 1:
            raise UserError(
                f"the training text has only {len(tokens)} tokens, fewer than data.seq_len + 1 = {seq_len + 1}; "
                "give more text or a shorter data.seq_len."
            )
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.windows = max(1, (len(tokens) - seq_len) // seq_len)
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)
        self._shift = 0

    def _begin(self, epoch: int) -> None:
        generator = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, epoch]))
        room = len(self.tokens) - 1 - self.windows * self.seq_len
        self._shift = int(generator.integers(min(self.seq_len - 1, room) + 1))
        self._order = generator.permutation(self.windows)
        self._epoch = epoch

    def row(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, self.windows)
        if epoch != self._epoch:
            self._begin(epoch)
        start = self._shift + int(self._order[place]) * self.seq_len
        return np.asarray(self.tokens[start : start + self.seq_len + 1], dtype=np.int64)


def make_batch(rows: list[np.ndarray]) -> Batch:
    """Rows of T + 1 tokens -> tokens and targets (B, T) int64."""
    block = torch.from_numpy(np.stack(rows))  # (B, T + 1)
    return {"tokens": block[:, :-1].contiguous(), "targets": block[:, 1:].contiguous()}


class TrainLoader:
    """Endless batches, prepared ahead by a thread.

    Args:
        rows: where the rows come from.
        batch_size: B.
        start: asked when the iteration begins: the number of the first micro-batch.
        prefetch: micro-batches that wait ready.
        pin_memory: put them into page-locked memory, for CUDA.

    `wait_seconds` is the time that the consumer has spent waiting for a batch. There is deliberately no `state_dict`:
    Lightning reads ahead and would save the position of what was fetched, not of what was trained on.
    """

    def __init__(
        self, rows: TrainSet, batch_size: int, start: Callable[[], int], prefetch: int = 4, pin_memory: bool = False
    ) -> None:
        self.rows, self.batch_size, self.start = rows, batch_size, start
        self.prefetch, self.pin_memory = prefetch, pin_memory
        self.wait_seconds = 0.0

    def batch(self, number: int) -> Batch:
        """Micro-batch number `number`."""
        first = number * self.batch_size
        batch = make_batch([self.rows.row(first + i) for i in range(self.batch_size)])
        return {name: t.pin_memory() for name, t in batch.items()} if self.pin_memory else batch

    def __iter__(self) -> Iterator[Batch]:
        return _Prefetcher(self)


class _Prefetcher(Iterator[Batch]):
    """Runs a thread that fills a queue; the thread ends with the iterator."""

    def __init__(self, loader: TrainLoader) -> None:
        self.loader = loader
        self.queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=loader.prefetch)
        self.stop = threading.Event()
        self.thread = threading.Thread(
            target=_fill, args=(loader, loader.start(), self.queue, self.stop), daemon=True, name="nanochat-data"
        )
        self.thread.start()
        # the thread holds no reference to this iterator, so that dropping the iterator ends the thread
        self._finalizer = weakref.finalize(self, self.stop.set)

    def __next__(self) -> Batch:
        if self.stop.is_set():
            raise StopIteration
        start = time.perf_counter()
        item = self.queue.get()
        self.loader.wait_seconds += time.perf_counter() - start
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def close(self) -> None:
        """End the thread."""
        self.stop.set()
        self.thread.join(timeout=5)


def _fill(loader: TrainLoader, number: int, ready: queue.Queue, stop: threading.Event) -> None:
    try:
        while not stop.is_set():
            _put(loader.batch(number), ready, stop)
            number += 1
    except BaseException as error:  # handed to the consumer, which raises it
        _put(error, ready, stop)


def _put(item: Batch | BaseException, ready: queue.Queue, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            return ready.put(item, timeout=0.1)
        except queue.Full:
            continue


class ValidationLoader:
    """Fixed windows over the validation tokens, in order, each target once; the last one is padded.

    Args:
        tokens: (n,) ids; at least two.
        seq_len: T.
        batch_size: B; the last batch may be smaller.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, batch_size: int) -> None:
        if len(tokens) < 2:
            raise UserError("the validation text has fewer than two tokens; give more text (data.val_paths).")
        self.tokens, self.seq_len, self.batch_size = tokens, seq_len, batch_size
        self.windows = -(-(len(tokens) - 1) // seq_len)

    def __len__(self) -> int:
        return -(-self.windows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, self.windows, self.batch_size):
            rows = [self._row(w) for w in range(first, min(first + self.batch_size, self.windows))]
            batch = make_batch([row for row, _ in rows])
            for i, (_, real) in enumerate(rows):
                batch["targets"][i, real:] = IGNORED
            yield batch

    def _row(self, window: int) -> tuple[np.ndarray, int]:
        piece = self.tokens[window * self.seq_len : (window + 1) * self.seq_len + 1]
        row = np.zeros(self.seq_len + 1, dtype=np.int64)
        row[: len(piece)] = piece
        return row, len(piece) - 1
