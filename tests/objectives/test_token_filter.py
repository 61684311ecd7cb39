"""Tokens that are drawn by the size of their gradient: as many as asked for, and unbiased."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from nanochat.objectives import IGNORED, linear_cross_entropy
from nanochat.objectives.token_filter import GradientSample, TopTokens, probabilities

COUNT, LENGTH, WIDTH, VOCABULARY = 5, 12, 6, 9


def case() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, output matrix and targets of which most are predicted well, in float64."""
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH, generator=source, dtype=torch.float64) * 2
    targets = torch.randint(VOCABULARY, (3, LENGTH), generator=source)
    noise = torch.randn(3, LENGTH, WIDTH, generator=source, dtype=torch.float64)
    hidden = 0.5 * weight[targets] + 0.7 * noise
    targets[1, 2:4] = IGNORED
    targets[2, 3:] = IGNORED  # fewer valid tokens than are kept
    return hidden, weight, targets


def gradients(hidden: Tensor, weight: Tensor, targets: Tensor, selector=None) -> Tensor:
    """Of the loss, at the hidden states and the output matrix, in one vector."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    linear_cross_entropy(hidden, weight, targets, selector=selector, chunk=LENGTH).loss.backward()
    return torch.cat([hidden.grad.flatten(), weight.grad.flatten()])


def norms(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """|softmax - one-hot| of each token, -inf where ignored."""
    p = (hidden @ weight.t()).softmax(-1)
    p = p - torch.nn.functional.one_hot(targets.clamp_min(0), VOCABULARY)
    return p.norm(dim=-1).masked_fill(targets == IGNORED, -torch.inf)


def every_draw(chance: Tensor, targets: Tensor) -> list[tuple[float, float]]:
    """(start, share of all starts that draw the same): the whole distribution, since only one number is drawn."""
    ends = torch.cat([chance[row, targets[row].argsort(stable=True)].cumsum(0) for row in range(len(chance))])
    edges = torch.cat([torch.zeros(1), ends % 1.0, torch.ones(1)]).unique()
    return [(float(a + b) / 2, float(b - a)) for a, b in pairwise(edges) if b - a > 1e-9]


def test_the_mean_over_all_draws_is_the_full_gradient_and_varies_less_than_uniform_draws() -> None:
    hidden, weight, targets = case()
    full = gradients(hidden, weight, targets)
    chance = probabilities(norms(hidden, weight, targets), COUNT)
    mean, error = torch.zeros_like(full), 0.0
    draws = every_draw(chance, targets)
    assert len(draws) > 10
    for start, share in draws:
        found = gradients(hidden, weight, targets, GradientSample(COUNT, targets, torch.full((3,), start)))
        mean += share * found
        error += share * float((found - full).square().sum())
    assert (mean - full).abs().max() <= 1e-6 * full.abs().max()
    source, uniform, times = torch.Generator().manual_seed(1), 0.0, 200
    for _ in range(times):
        selector = TopTokens(COUNT, scores=torch.rand(targets.shape, generator=source))
        uniform += float((gradients(hidden, weight, targets, selector) - full).square().sum()) / times
    assert error < 0.5 * uniform


def test_probabilities_against_a_search() -> None:
    """c in p = min(1, c q) by bisection."""
    values = torch.rand(20, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64).pow(4)
    values[3, 5:] = 0.0
    for count in (1, 7, 29, 30):
        found = probabilities(values, count)
        assert torch.allclose(found.sum(1), torch.full((20,), float(count), dtype=torch.float64))
        for row, got in zip(values, found, strict=True):
            q = 0.95 * row / row.mean() + 0.05
            low, high = 0.0, 1e9
            for _ in range(200):
                c = (low + high) / 2
                low, high = (c, high) if (c * q).clamp_max(1.0).sum() < count else (low, c)
            assert torch.allclose(got, (high * q).clamp_max(1.0), atol=1e-6)


@pytest.mark.parametrize("count", [1, 5, 11, 12])
def test_positions_are_distinct_sorted_and_valid_first(count: int) -> None:
    hidden, weight, targets = case()
    scores = norms(hidden, weight, targets)
    scores[0] = 1.0  # probabilities whose sums are hit exactly
    for start in (0.0, 0.25, 0.5, 1 - 2**-24):
        selector = GradientSample(count, targets, torch.full((3,), start))
        first, rest = selector(scores[:1]), selector(scores[1:])  # in chunks
        positions, weights = torch.cat([first[0], rest[0]]), torch.cat([first[1], rest[1]])
        assert positions.shape == weights.shape == (3, count)
        assert (positions.diff(dim=1) > 0).all()
        for row, valid in enumerate((targets != IGNORED).sum(1).tolist()):
            assert int((targets[row, positions[row]] != IGNORED).sum()) == min(count, valid)
            assert ((weights[row] == 0) == (targets[row, positions[row]] == IGNORED)).all()
        assert count < 3 or torch.allclose(weights[2, :3], torch.ones(3, dtype=weights.dtype))


def test_what_is_not_finite_stays_visible() -> None:
    scores = torch.ones(1, LENGTH, dtype=torch.float64)
    scores[0, 3] = torch.nan
    _, weights = GradientSample(COUNT, torch.zeros(1, LENGTH, dtype=torch.int64), torch.zeros(1))(scores)
    assert weights.isnan().all()
