"""Sequences without any text: for speed, and for tests with a known answer."""

from __future__ import annotations

import numpy as np


class Synthetic:
    """Row i is, by i mod 3, one token repeated, a ramp of consecutive tokens, or noise; each a pure function of (seed, i).

    Args:
        vocab_size: V; at least 2.
        seq_len: T; rows have T + 1 tokens.
        seed: of the noise.
    """

    def __init__(self, vocab_size: int, seq_len: int, seed: int) -> None:
        self.vocab_size, self.seq_len, self.seed = vocab_size, seq_len, seed

    def row(self, number: int) -> np.ndarray:
        """(T + 1,) int64."""
        size, length = self.vocab_size, self.seq_len + 1
        if number % 3 == 0:
            return np.full(length, number % (size - 1) + 1, dtype=np.int64)
        if number % 3 == 1:
            return (number % size + np.arange(length, dtype=np.int64)) % size
        generator = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, number]))
        return generator.integers(size, size=length, dtype=np.int64)
