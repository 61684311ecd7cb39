"""Sequences without text, for tests of speed and of learning: the three kinds of the original system.

Sequence i (of T + 1 ids, vocabulary V) is, by i mod 3:

    0  one id repeated: i mod (V - 1) + 1
    1  a ramp: (i + j) mod V at position j
    2  uniformly random ids, from a stream of their own for (seed, i)
"""

from __future__ import annotations

import numpy as np
import torch

from nanochat.data.dataset import Batch, words
from nanochat.data.tokenizer import Byte, Tokenizer
from nanochat.errors import UserError

VALIDATION_FROM = 1 << 40
"""the number of the first validation sequence, which no training run reaches"""


def sequence(vocab_size: int, length: int, seed: int, index: int) -> np.ndarray:
    """(length,) int64: sequence number `index`."""
    kind = index % 3
    if kind == 0:
        return np.full(length, index % (vocab_size - 1) + 1, dtype=np.int64)
    if kind == 1:
        return (index % vocab_size + np.arange(length, dtype=np.int64)) % vocab_size
    return (words(seed, index, length) % np.uint64(vocab_size)).astype(np.int64)


class SyntheticBatches:
    """Sequences in order, batch by batch.

    Args:
        first: the number of the first sequence.
        count: batches; None is without end.
    """

    def __init__(
        self, vocab_size: int, seq_len: int, batch_size: int, seed: int, first: int = 0, count: int | None = None
    ) -> None:
        if vocab_size < 2:
            raise UserError(f"data.vocab_size={vocab_size} must be at least 2.")
        self.vocab_size, self.seq_len, self.batch_size = vocab_size, seq_len, batch_size
        self.seed, self.first, self.count = seed, first, count

    def batch(self, index: int) -> Batch:
        """Micro-batch `index`: {"tokens", "targets"} (B, T) int64."""
        start = self.first + index * self.batch_size
        rows = [
            sequence(self.vocab_size, self.seq_len + 1, self.seed, i) for i in range(start, start + self.batch_size)
        ]
        window = torch.from_numpy(np.stack(rows))
        return {"tokens": window[:, :-1].contiguous(), "targets": window[:, 1:].contiguous()}


class FiniteBatches(SyntheticBatches):
    """A validation set: `count` batches."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        return map(self.batch, range(self.count))


class NoText(Tokenizer):
    """A byte tokenizer for ids that stand for no text: it can decode them, but they have no bytes."""

    def __init__(self) -> None:
        super().__init__(Byte().build()._inner, "byte")

    def token_bytes(self) -> None:
        return None
