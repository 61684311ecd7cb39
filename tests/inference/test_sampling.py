"""Sampling against a plain-Python float64 oracle, and its draws against the distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import UserError
from nanochat.inference.sampling import Sampling, draw_tokens, probabilities, sample


def brute_force(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    best = max(logits)
    weights = [math.exp((x - best) / temperature) for x in logits]
    ranked = sorted(range(len(logits)), key=lambda i: -weights[i])
    ranked = ranked[: top_k or None]
    total = sum(weights[i] for i in ranked)
    kept, reached = [], 0.0
    for i in ranked:
        if kept and reached >= top_p:
            break
        kept.append(i)
        reached += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(-160, 160).map(lambda n: n / 8), min_size=1, max_size=30, unique=True),
    st.sampled_from([0.1, 0.7, 1.0, 2.5]),
    st.integers(0, 40),
    st.sampled_from([0.05, 0.5, 0.9, 1.0]),
)
def test_the_distribution_is_the_brute_force_one(logits, temperature, top_k, top_p):
    ours = probabilities(torch.tensor([logits], dtype=torch.float64), Sampling(temperature, top_k, top_p))[0]
    expected = torch.tensor(brute_force(logits, temperature, top_k, top_p), dtype=torch.float64)
    # a cumulative sum that lands on top_p to the last bit may keep one token more or less
    if not torch.allclose(ours, expected, atol=1e-12):
        assert abs((ours > 0).sum() - (expected > 0).sum()) == 1
        total = torch.tensor(brute_force(logits, temperature, top_k, 1.0)).sort(descending=True).values.cumsum(0)
        assert (total - top_p).abs().min() < 1e-6


def test_temperature_zero_is_greedy_and_a_tiny_one_does_not_overflow():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 50
    assert torch.equal(probabilities(logits, Sampling(0)).argmax(-1), logits.argmax(-1))
    tiny = probabilities(logits, Sampling(1e-300))
    assert torch.equal(tiny, probabilities(logits, Sampling(0)))


def test_equal_logits_keep_exactly_k():
    kept = probabilities(torch.zeros(2, 10), Sampling(1.0, top_k=3))
    assert (kept > 0).sum(-1).tolist() == [3, 3]
    assert torch.allclose(kept.sum(-1), torch.ones(2, dtype=torch.float64))


def test_draws_follow_the_distribution():
    """Chi-square over 20,000 draws; 27.9 is the 0.1% point of 9 degrees of freedom."""
    weights = torch.tensor([0.3, 0.0, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.03, 0.015, 0.005], dtype=torch.float64)
    n = 20_000
    generator = torch.Generator().manual_seed(3)
    tokens = draw_tokens(weights.expand(n, -1), [generator] * n)
    counts = tokens.bincount(minlength=len(weights)).double()
    assert counts[1] == 0
    positive = weights > 0
    assert ((counts - n * weights).square()[positive] / (n * weights[positive])).sum() < 27.9


def test_a_row_depends_on_its_own_generator_alone():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    together = sample(logits, Sampling(1.0), [torch.Generator().manual_seed(i) for i in range(6)])
    alone = [sample(logits[i : i + 1], Sampling(1.0), [torch.Generator().manual_seed(i)]) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99999, 1.0])
@pytest.mark.parametrize("scale", [0.01, 5.0])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_sorting_all(top_p, scale):
    """Flat and peaked rows of 5,000 tokens, of which only a few are looked at first."""
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(2)).double() * scale
    for row in logits:
        expected = torch.tensor(brute_force(row.tolist(), 0.7, 0, top_p), dtype=torch.float64)
        torch.testing.assert_close(probabilities(row, Sampling(0.7, top_p=top_p)), expected, atol=1e-12, rtol=0)


def test_min_p_keeps_what_is_likely_enough():
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0, -3.0])
    plain = probabilities(logits, Sampling(1.0))
    for top_p in (1.0, 0.95):
        kept = probabilities(logits, Sampling(1.0, top_p=top_p, min_p=0.13))
        assert (kept > 0).tolist() == [True, True, True, False, False]
        torch.testing.assert_close(kept[:3], plain[:3] / plain[:3].sum())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_of_a_diverged_model(bad):
    with pytest.raises(UserError, match="diverged"):
        sample(torch.tensor([[0.0, bad]]), Sampling(1.0), [torch.Generator()])


@pytest.mark.parametrize(
    ("values", "name"),
    [((-1.0, 0, 1.0), "temperature"), ((float("nan"), 0, 1.0), "temperature"), ((1.0, -1, 1.0), "top-k"),
     ((1.0, 0, 0.0), "top-p"), ((1.0, 0, 1.1), "top-p")],
)  # fmt: skip
def test_values_that_mean_nothing(values, name):
    with pytest.raises(UserError, match=name):
        Sampling(*values)


@pytest.mark.parametrize(
    "values",
    [{"min_p": -0.1}, {"min_p": 2.0}, {"repetition_penalty": 0.0}, {"presence_penalty": math.inf},
     {"frequency_penalty": math.nan}],
)  # fmt: skip
def test_values_of_penalties_that_mean_nothing(values):
    with pytest.raises(UserError, match=f"--{next(iter(values)).replace('_', '-')}"):
        Sampling(**values)
