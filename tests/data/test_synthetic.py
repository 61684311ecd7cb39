"""Synthetic sequences: the three kinds, as functions of (seed, number)."""

import numpy as np
import pytest
import torch

from nanochat.data.synthetic import FiniteBatches, NoText, SyntheticBatches, sequence
from nanochat.errors import UserError


def test_the_three_kinds():
    size, length = 50, 300
    for i in (0, 3, 147, 150, 3_000_000_000):
        assert sequence(size, length, 0, i).tolist() == [i % (size - 1) + 1] * length
    for i in (1, 4, 151, 3_000_000_001):
        assert sequence(size, length, 0, i).tolist() == [(i + j) % size for j in range(length)]
    noise = np.stack([sequence(size, length, 0, i) for i in range(2, 600, 3)])
    counts = np.bincount(noise.ravel(), minlength=size)
    assert len(counts) == size
    assert abs(counts / noise.size - 1 / size).max() < 0.2 / size
    assert len({tuple(row) for row in noise}) == len(noise)


def test_only_the_noise_depends_on_the_seed():
    same = [np.array_equal(sequence(50, 40, 1, i), sequence(50, 40, 2, i)) for i in range(3)]
    assert same == [True, True, False]
    assert np.array_equal(sequence(50, 40, 1, 2), sequence(50, 40, 1, 2))


def test_batches_are_the_sequences_in_order():
    batches = SyntheticBatches(50, 12, 4, seed=3, first=10)
    for index in (0, 7):
        batch = batches.batch(index)
        for row in range(4):
            expected = sequence(50, 13, 3, 10 + 4 * index + row)
            assert batch["tokens"][row].tolist() == expected[:-1].tolist()
            assert batch["targets"][row].tolist() == expected[1:].tolist()
    assert batch["tokens"].dtype == torch.int64
    finite = FiniteBatches(50, 12, 4, seed=3, first=10, count=3)
    assert len(list(finite)) == len(finite) == 3
    assert torch.equal(list(finite)[2]["tokens"], batches.batch(2)["tokens"])


def test_a_vocabulary_of_one():
    with pytest.raises(UserError, match=r"data\.vocab_size=1"):
        SyntheticBatches(1, 8, 2, 0)


def test_ids_without_text_have_no_bytes():
    tokenizer = NoText()
    assert tokenizer.token_bytes() is None
    assert tokenizer.decode([65, 4000]) == "A"
