"""Tokens -> batches, as pure functions of a position.

Training: an epoch cuts the tokens into windows of `seq_len` inputs (and one more token, the last target) that begin
at a shift drawn for the epoch, and takes them in an order drawn for the epoch. Windows share only that one token, so
each token is an input at most once an epoch; the shift moves the borders, and what an epoch leaves out (fewer than
2 * seq_len tokens at both ends together) changes with it. Every epoch has the same number of windows, so that row b
of batch i is window number (i * batch_size + b) of the endless sequence of epochs: nothing depends on what was read
before. Draws are raw Philox words, whose stream numpy keeps from version to version.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.objectives import IGNORED

Batch = dict[str, Tensor]


class Batches(Protocol):
    """Micro-batches by number."""

    def batch(self, index: int) -> Batch:
        """{"tokens", "targets"}: (B, T) int64."""
        ...


def words(seed: int, stream: int, count: int) -> np.ndarray:
    """(count,) uint64 of random bits that depend on the arguments alone."""
    # a key of uint64 pairs; both parts may be any whole number
    key = np.array([seed & (1 << 64) - 1, stream & (1 << 64) - 1], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count)


class TrainBatches:
    """Windows of the training split.

    Args:
        tokens: (N,) ids.
        vocab_size: larger ids are damage.

    Raises:
        UserError: when there are fewer than seq_len + 1 tokens.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, batch_size: int, seed: int, vocab_size: int) -> None:
        if len(tokens) < seq_len + 1:
            raise UserError(
                f"the training text has {len(tokens):,} tokens, too few for one sequence of {seq_len:,} and its last "
                "target; give more text, or shorten data.seq_len (where it is not set, model.seq_len)."
            )
        self.tokens, self.seq_len, self.batch_size = tokens, seq_len, batch_size
        self.seed, self.vocab_size = seed, vocab_size
        # with room for a shift of seq_len - 1, unless the text is that short
        self.windows = max(1, (len(tokens) - seq_len) // seq_len)
        self._slack = len(tokens) - 1 - self.windows * seq_len
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)  # a batch spans two epochs at times

    def starts(self, index: int) -> list[int]:
        """Where in the tokens the rows of batch `index` begin."""
        starts = []
        for row in range(index * self.batch_size, (index + 1) * self.batch_size):
            epoch, number = divmod(row, self.windows)
            shift, order = self._epoch(epoch)
            starts.append(shift + int(order[number]) * self.seq_len)
        return starts

    def batch(self, index: int) -> Batch:
        """Micro-batch `index` of the run."""
        rows = [self.tokens[start : start + self.seq_len + 1] for start in self.starts(index)]
        window = _checked(np.stack(rows), self.vocab_size)
        return {"tokens": window[:, :-1].contiguous(), "targets": window[:, 1:].contiguous()}

    def _draw_epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        drawn = words(self.seed, epoch, self.windows + 1)
        order = np.argsort(drawn[1:], kind="stable")
        return int(drawn[0] % np.uint64(self._slack + 1)), order.astype(
            np.uint32 if self.windows < 1 << 32 else np.uint64
        )


class ValBatches:
    """Windows of the validation split, in order and without overlap: each token but the first is a target once.

    The last window is filled up with targets that are ignored, as is the last batch, so that all have one shape.

    Args:
        tokens: (N,) ids.
        limit: use the first so many targets; None takes all.

    Raises:
        UserError: when there are fewer than two tokens.
    """

    def __init__(
        self, tokens: np.ndarray, seq_len: int, batch_size: int, vocab_size: int, limit: int | None = None
    ) -> None:
        if len(tokens) < 2:
            raise UserError("the validation text has no two tokens; give more text, or data.val_paths.")
        self.targets = len(tokens) - 1 if limit is None else min(limit, len(tokens) - 1)
        """targets that count"""
        self.tokens, self.seq_len, self.vocab_size = tokens, seq_len, vocab_size
        self.windows = -(-self.targets // seq_len)
        self.batch_size = min(batch_size, self.windows)

    def __len__(self) -> int:
        return -(-self.windows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.batch, range(len(self)))

    def batch(self, index: int) -> Batch:
        """Batch `index`, from 0 to len - 1."""
        shape = (self.batch_size, self.seq_len)
        first = index * self.batch_size * self.seq_len
        count = min(self.batch_size * self.seq_len, self.targets - first)
        text = _checked(self.tokens[first : first + count + 1], self.vocab_size)
        tokens = torch.zeros(shape, dtype=torch.int64)
        targets = torch.full(shape, IGNORED)
        tokens.view(-1)[:count], targets.view(-1)[:count] = text[:-1], text[1:]
        return {"tokens": tokens, "targets": targets}


class RankBatches:
    """One rank's rows of the global micro-batches: rows r * B to (r + 1) * B of the W * B of each.

    Args:
        batches: micro-batches of B rows.
    """

    def __init__(self, batches: Batches, rank: int, world: int) -> None:
        self.batches, self.rank, self.world = batches, rank, world

    def batch(self, index: int) -> Batch:
        """This rank's rows of global micro-batch `index`."""
        return self.batches.batch(index * self.world + self.rank)


class RankValidation:
    """One rank's batches of a validation: every W-th one, and as many on each rank; those beyond the end count nothing.

    Args:
        batches: a validation set.
    """

    def __init__(self, batches: Any, rank: int, world: int) -> None:
        self.batches, self.rank, self.world = batches, rank, world

    def __len__(self) -> int:
        return -(-len(self.batches) // self.world)

    def __iter__(self) -> Iterator[Batch]:
        for index in range(self.rank, len(self) * self.world, self.world):
            if index < len(self.batches):
                yield self.batches.batch(index)
            else:
                batch = self.batches.batch(0)
                yield {**batch, "targets": torch.full_like(batch["targets"], IGNORED)}


def _checked(ids: np.ndarray, vocab_size: int) -> Tensor:
    """int64 ids, all of the vocabulary: the embedding would fail on others, on a GPU beyond recovery."""
    ids = ids.astype(np.int64)
    if ids.size and ids.max() >= vocab_size:
        raise UserError(
            f"the prepared data has token {ids.max()}, beyond the tokenizer's {vocab_size}: it is damaged; "
            "delete it from data.cache_dir and start again."
        )
    return torch.from_numpy(ids)
