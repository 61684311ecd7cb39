"""Batches are pure functions of their number, and an epoch shows each token once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data.dataset import IGNORED, TrainBatches, ValBatches, words
from nanochat.errors import UserError


def numbered(count: int) -> np.ndarray:
    """Tokens that are their own positions."""
    return np.arange(count, dtype=np.uint32)


@given(
    count=st.integers(2, 400),
    seq_len=st.integers(1, 40),
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 2**64),
    start=st.integers(0, 30),
)
@settings(max_examples=200, deadline=None)
def test_each_epoch_shows_each_token_once(count, seq_len, batch_size, seed, start):
    if count < seq_len + 1:
        with pytest.raises(UserError, match=rf"{count} tokens, too few for one sequence of {seq_len} .*data\.seq_len"):
            TrainBatches(numbered(count), seq_len, batch_size, seed, count)
        return
    batches = TrainBatches(numbered(count), seq_len, batch_size, seed, count)
    first = start * batches.windows
    rows = {}
    for index in range(first // batch_size, (first + batches.windows) // batch_size + 1):
        batch = batches.batch(index)
        assert batch["tokens"].shape == batch["targets"].shape == (batch_size, seq_len)
        assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64
        assert (batch["targets"] == batch["tokens"] + 1).all()
        rows.update({index * batch_size + b: row for b, row in enumerate(batch["tokens"].tolist())})
    epoch = [token for number in range(first, first + batches.windows) for token in rows[number]]
    # one run of positions, in some order of windows: nothing twice, nothing left out between its ends
    assert sorted(epoch) == list(range(min(epoch), min(epoch) + len(epoch)))
    # what is left out lies at the ends, and is less than two windows
    assert count - 1 - len(epoch) < 2 * seq_len
    # starts() says where the rows begin
    assert batches.starts(first // batch_size) == batches.batch(first // batch_size)["tokens"][:, 0].tolist()


def test_epochs_differ_in_order_and_shift_and_reach_every_token():
    batches = TrainBatches(numbered(1000), 16, 1, 0, 1000)
    epochs = [[batches.starts(e * batches.windows + i)[0] for i in range(batches.windows)] for e in range(200)]
    assert len({tuple(epoch) for epoch in epochs}) == 200
    assert len({min(epoch) for epoch in epochs}) > 16
    seen = np.zeros(999, dtype=int)
    for epoch in epochs:
        for start in epoch:
            seen[start : start + 16] += 1
    assert seen.min() >= 1
    assert seen[32:-32].min() == 200
    # every place in the order is as likely for every window
    positions = np.array([np.argsort(epoch) for epoch in epochs])
    assert abs(positions.mean(0) - (batches.windows - 1) / 2).max() < 6


def test_batches_depend_on_number_and_seed_alone():
    tokens = numbered(777)
    order = [5, 0, 100, 5, 31, 2]
    first, second = (TrainBatches(tokens, 8, 4, 7, 777) for _ in range(2))
    forward = {i: second.batch(i)["tokens"] for i in range(101)}
    assert all(torch.equal(first.batch(i)["tokens"], forward[i]) for i in order)
    other = TrainBatches(tokens, 8, 4, 8, 777)
    assert not torch.equal(other.batch(0)["tokens"], forward[0])


def philox(key: tuple[int, int], count: int) -> list[int]:
    """Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), counting from 1."""
    mask, drawn = (1 << 64) - 1, []
    for counter in range(1, -(-count // 4) + 1):
        c, (k0, k1) = [counter, 0, 0, 0], key
        for _ in range(10):
            left, right = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [(right >> 64) ^ c[1] ^ k0, right & mask, (left >> 64) ^ c[3] ^ k1, left & mask]
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
        drawn += c
    return drawn[:count]


def test_draws_are_those_of_philox():
    # a stream that changed with numpy's version would change the order of a run that is resumed
    for seed, epoch in ((0, 0), (1, 2), (2**63, 10**6)):
        assert words(seed, epoch, 9).tolist() == philox((seed, epoch), 9)


@given(
    count=st.integers(2, 200),
    seq_len=st.integers(1, 30),
    batch_size=st.integers(1, 6),
    limit=st.none() | st.integers(1, 250),
)
@settings(max_examples=200, deadline=None)
def test_validation_takes_each_target_once_in_order(count, seq_len, batch_size, limit):
    batches = ValBatches(numbered(count), seq_len, batch_size, count, limit)
    used = count - 1 if limit is None else min(limit, count - 1)
    seen = list(batches)
    assert len(seen) == len(batches)
    assert {tuple(batch["tokens"].shape) for batch in seen} == {(batches.batch_size, seq_len)}
    targets = torch.cat([batch["targets"].flatten() for batch in seen])
    tokens = torch.cat([batch["tokens"].flatten() for batch in seen])
    valid = targets != IGNORED
    assert targets[valid].tolist() == list(range(1, used + 1))
    assert (tokens[valid] + 1 == targets[valid]).all()
    assert len(targets) - used < batches.batch_size * seq_len  # no more filling than the last batch needs
    assert valid[:used].all()
    again = list(batches)
    assert all(torch.equal(a["targets"], b["targets"]) for a, b in zip(seen, again, strict=True))


@pytest.mark.parametrize("count", [0, 1])
def test_no_text_to_validate(count):
    with pytest.raises(UserError, match=r"data\.val_paths"):
        ValBatches(numbered(count), 8, 2, 100)


def test_ids_beyond_the_vocabulary_are_damage():
    tokens = numbered(100)
    with pytest.raises(UserError, match="token 99, beyond the tokenizer's 99"):
        list(ValBatches(tokens, 8, 2, 99))
    train = TrainBatches(tokens, 99, 1, 0, 99)
    with pytest.raises(UserError, match="damaged"):
        train.batch(0)
