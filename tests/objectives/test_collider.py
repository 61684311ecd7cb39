"""Collider: which tokens are kept, what every objective then sees, and the cache of a reference's losses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanochat.errors import ConfigError
from nanochat.model import GPT, GPTConfig
from nanochat.model.compact_backward import KeptRows
from nanochat.objectives import IGNORED, NextToken, Step
from nanochat.objectives.mtp import MultiTokenPrediction
from nanochat.objectives.next_token import kept_metrics
from nanochat.objectives.sampling import draw_positions, generator
from nanochat.objectives.token_filter import TopTokens, kept_count
from nanochat.training.callbacks.collider import Collider
from nanochat.training.score_cache import ScoreCache
from tests.model.test_compact_backward import BASE, cut, data, network, oracle_hidden


def scores(batch=3, length=10, seed=0):
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) * 5


def highest(values, count):
    return [sorted(sorted(range(len(row)), key=lambda i: -row[i])[:count]) for row in values.tolist()]


def test_the_highest_losses_are_kept_in_order():
    losses = scores()
    assert TopTokens(4)(losses).tolist() == highest(losses, 4)


def test_baseline_and_scores_follow_the_chunks():
    losses, other = scores(4), scores(4, seed=1)
    for selector, expected in (
        (TopTokens(3, baseline=other), losses - other),
        (TopTokens(3, scores=other), other),
    ):
        chunks = torch.cat([selector(losses[:1]), selector(losses[1:3]), selector(losses[3:])])
        assert chunks.tolist() == highest(expected, 3)


@pytest.mark.parametrize("kind", ["loss", "baseline", "scores"])
def test_ignored_targets_come_last(kind):
    losses = scores(2, 8)
    losses[0, :5] = -torch.inf
    extra = {} if kind == "loss" else {kind: scores(2, 8, 1) * 10}
    assert {5, 6, 7} <= set(TopTokens(4, **extra)(losses)[0].tolist())


@pytest.mark.parametrize(("length", "sparsity", "count"), [(512, 0.4, 307), (10, 0.5, 5), (3, 0.99, 1), (64, 0.0, 64)])
def test_the_count_is_static(length, sparsity, count):
    assert kept_count(length, sparsity) == count


def test_metrics():
    targets = torch.tensor([[1, 1, IGNORED, 1], [1, IGNORED, 1, 1]])
    losses = torch.tensor([[4.0, 1.0, 0.0, 2.0], [3.0, 0.0, 5.0, 0.5]])
    metrics = kept_metrics(targets, losses, torch.tensor([[0, 2], [0, 2]]))
    assert metrics["collider/kept_fraction"].item() == pytest.approx(3 / 6)
    assert metrics["collider/kept_loss"].item() == pytest.approx(12 / 3)
    assert metrics["collider/dropped_loss"].item() == pytest.approx(3.5 / 3)


# a micro-batch in which a sequential head draws the last two of three sequences
MICRO_STEP = next(m for m in range(50) if draw_positions(torch.ones(3).bool(), 2, generator(0, m)).tolist() == [1, 2])


def run_step(gpt, objectives, tokens, targets, compact):
    """The summed loss of one micro-batch, filtered, with the compact backward or the oracle's detached tokens."""
    gpt.zero_grad()
    gpt.kept_rows = KeptRows() if compact else None
    objectives[0].selector = TopTokens(14)
    step = Step.of(gpt, tokens, targets, eot_id=0, micro_step=MICRO_STEP)
    loss = torch.stack([o(step) for o in objectives]).sum()
    gpt.kept_rows = None
    return loss, step


def gradients(*modules):
    return {f"{i}.{n}": p.grad.clone() for i, m in enumerate(modules) for n, p in m.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "switches"),
    [
        (None, {}),
        ("sequential", {}),
        ("weights-only", {}),
        ("parallel", {}),
        ("sequential", {"streams": 2}),
        ("sequential", {"value_embeddings": 2}),
    ],
    ids=str,
)
def test_a_filtered_step_with_mtp_is_the_oracles(kind, switches, monkeypatch):
    config = GPTConfig(**{**BASE.__dict__, **switches})
    gpt = network(config).float()
    objectives = [NextToken(config)]
    if kind:
        objectives.append(MultiTokenPrediction(config, kind=kind, tokens=2, weight=1.0, token_fraction=0.6))
    tokens, targets = data(config, batch=3)
    targets[1, 4:7] = IGNORED
    loss, step = run_step(gpt, objectives, tokens, targets, compact=True)
    loss.backward()
    assert step.kept.shape == (3, 14)
    got = gradients(gpt, *objectives)
    for module in (gpt, *objectives):
        module.zero_grad()
    kept = step.kept
    hidden, embedded = oracle_hidden(gpt, tokens, kept, monkeypatch), gpt.embed(tokens)
    oracle = Step(gpt, tokens, targets, hidden, embedded, gpt.lane(tokens), eot_id=0, micro_step=MICRO_STEP)
    if kind == "sequential":
        detach_in_heads(objectives[1], kept, monkeypatch)
    objectives[0].selector = TopTokens(14)
    expected_loss = torch.stack([o(oracle) for o in objectives]).sum()
    expected_loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    for name, value in gradients(gpt, *objectives).items():
        small = ".hyper_" in name  # sums over all the streams hold: rounding of what cancels
        assert (got[name] - value).norm() <= 1e-5 * (value.norm() + (1.0 if small else 0.0)), name


def detach_in_heads(mtp, kept, monkeypatch):
    """The oracle's treatment of an MTP block: the stream after each sub-layer, k and v."""
    import nanochat.model.attention as attention_module

    inner = attention_module.causal_attention

    def head_forward(self, hidden, embedded, cos, sin, cache=None, kept=None, square=None):
        where = kept.positions
        with monkeypatch.context() as patch:
            patch.setattr(attention_module, "causal_attention", lambda q, k, v: inner(q, cut(k, where), cut(v, where)))
            x = torch.cat((self.embedding_norm(embedded, square), self.hidden_norm(hidden)), dim=-1)
            x = cut(self.eh_proj(quantise(x)), where)
            x = cut(x + self.block.attention(x, cos, sin), where)
            return self.norm(cut(x + self.block.feedforward(x), where))

    def quantise(x):
        from nanochat.model.bitlinear import int8_activation

        return int8_activation(x, "token")

    for head in mtp.heads:
        monkeypatch.setattr(head, "forward", head_forward.__get__(head))


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_bf16_with_mtp_and_accumulation():
    gpt = network(BASE)
    objectives = [NextToken(BASE), MultiTokenPrediction(BASE, token_fraction=1.0)]

    def accumulated(autocast):
        for module in (gpt, *objectives):
            module.zero_grad()
        total = {}
        for seed in range(2):
            tokens, targets = data(BASE, seed=seed)
            objectives[0].selector = lambda s: torch.arange(0, 24, 2).expand(s.shape[0], 12)
            gpt.kept_rows = KeptRows()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                step = Step.of(gpt, tokens, targets, eot_id=0, micro_step=seed)
                loss = torch.stack([o(step) for o in objectives]).sum()
            loss.backward()
        total = gradients(gpt, *objectives)
        return torch.cat([g.flatten() for g in total.values()])

    exact, rounded = accumulated(False), accumulated(True)
    assert rounded.dtype == torch.float32
    assert (exact - rounded).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 1.0}, "collider.sparsity=1.0"),
        ({"sparsity": -0.1}, "collider.sparsity=-0.1"),
        ({"score": "entropy"}, "collider.score='entropy'"),
        ({"score": "excess"}, "collider.reference=RUN"),
        ({"score": "loss", "reference": "somewhere"}, "belong together"),
        ({"cache": "somewhere"}, "collider.reference=RUN too"),
        ({"warmup_steps": -1}, "collider.warmup_steps=-1"),
    ],
)
def test_impossible_options(options, words):
    with pytest.raises(ConfigError, match=words):
        Collider(**options)


def test_the_cache_gives_back_what_it_was_given(tmp_path):
    reference = GPT(BASE, seed=0)
    tokens, targets = data(BASE, batch=3)
    losses = scores(3, 24)
    cache = ScoreCache(tmp_path / "new" / "folder", reference)
    assert cache.get(tokens, targets) is None
    kept = cache.put(tokens, targets, losses)
    assert torch.allclose(kept, losses, rtol=1e-3)
    again = ScoreCache(tmp_path / "new" / "folder", reference)
    assert torch.equal(again.get(tokens[1:], targets[1:]), kept[1:])
    assert again.get(tokens, targets.roll(1, 1)) is None
    assert ScoreCache(tmp_path / "new" / "folder", GPT(BASE, seed=1)).get(tokens, targets) is None


def test_a_cut_off_record_is_not_read(tmp_path):
    reference = GPT(BASE, seed=0)
    cache = ScoreCache(tmp_path, reference)
    (one, one_t), (two, two_t) = data(BASE, batch=1), data(BASE, batch=1, seed=1)
    cache.put(one, one_t, scores(1, 24))
    cache.put(two, two_t, scores(1, 24))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    again = ScoreCache(tmp_path, reference)
    assert again.get(one, one_t) is not None
    assert again.get(two, two_t) is None
    second = again.put(two, two_t, scores(1, 24, seed=2))
    assert torch.equal(ScoreCache(tmp_path, reference).get(two, two_t), second)
    assert np.isfinite(second.numpy()).all()


@pytest.mark.parametrize("score", ["random", "gradient"])
def test_random_tokens_are_drawn_anew_for_each_micro_batch(score):
    module = SimpleNamespace(
        cfg={"seed": 5}, device=torch.device("cpu"), gpt=GPT(BASE), objectives={"next_token": NextToken(BASE)}
    )
    losses = scores(3, 24)

    def chosen(consumed, seed=5):
        module.cfg["seed"] = seed
        trainer = SimpleNamespace(global_step=0, max_steps=100, datamodule=SimpleNamespace(consumed=consumed))
        collider = Collider(0.5, score, warmup_steps=0)
        collider.on_train_batch_start(trainer, module, {"targets": torch.ones(3, 24, dtype=torch.long)}, 0)
        selected = module.objectives["next_token"].selector(losses)
        selected = selected[0] if score == "gradient" else selected
        assert selected.shape == (3, 12)
        return selected.tolist()

    torch.manual_seed(1)
    first, second = chosen(7), chosen(8)
    torch.manual_seed(2)  # the global generator does not matter
    assert chosen(7) == first
    assert chosen(8) == second
    # sequences differ from one another too; one start draws few different samples of 24 tokens
    assert len({str(row) for row in [*first, *second]}) >= (6 if score == "random" else 4)
    assert chosen(7, seed=6) != first


def test_reference_losses_are_the_reference_networks_own():
    reference = network(GPTConfig(**{**BASE.__dict__, "softcap": 4.0})).float()
    tokens, targets = data(BASE, batch=3)
    targets[1, 4:7] = IGNORED
    collider = Collider(score="excess", reference="a run")
    collider._reference = reference
    found = collider._reference_losses({"tokens": tokens, "targets": targets})
    with torch.no_grad():
        expected = F.cross_entropy(reference(tokens).mT, targets, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_score_that_is_not_named_follows_the_reference():
    assert Collider().score == "random"
    assert Collider(reference="a run").score == "excess"
    assert Collider(score="loss").score == "loss"
