"""The next-token objective: what it puts into the step, and its options."""

import pytest
import torch

from nanochat.errors import ConfigError
from nanochat.model import GPT, GPTConfig
from nanochat.objectives import IGNORED, NextToken, Step, linear_cross_entropy

CONFIG = GPTConfig(vocab_size=37, dim=16, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=24, seq_len=12, softcap=5.0)


@pytest.fixture
def step():
    gpt = GPT(CONFIG, seed=0)
    tokens = torch.randint(37, (2, 12), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(-1, 1)
    targets[:, -1] = IGNORED
    return Step.of(gpt, tokens, targets)


def test_the_loss_is_the_models_cross_entropy(step):
    loss = NextToken(CONFIG)(step)
    logits = step.gpt(step.tokens).double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), step.targets.flatten(), ignore_index=IGNORED)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert step.per_token_loss.shape == (2, 12)
    assert step.kept is None
    loss.backward()
    assert step.gpt.embedding.weight.grad.any()


def test_the_logged_loss_is_plain_and_over_all_valid_targets(step):
    plain = linear_cross_entropy(step.hidden, step.gpt.head_weight(), step.targets, softcap=5.0).loss.item()
    objective = NextToken(CONFIG, label_smoothing=0.3, z_loss=0.1)
    objective.selector = lambda scores: scores.topk(4, 1).indices.sort(1).values
    loss = objective(step)
    assert step.metrics["train/loss"].item() == pytest.approx(plain, rel=1e-6)
    assert loss.item() > 1.1 * plain
    assert step.kept.shape == (2, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"z_loss": -1.0}, "z_loss"),
        ({"z_loss": float("nan")}, "z_loss"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_impossible_options(options, words):
    with pytest.raises(ConfigError, match=f"loss.{words}"):
        NextToken(CONFIG, **options)
