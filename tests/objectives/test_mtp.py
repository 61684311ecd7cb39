"""Multi-token prediction against brute force in float64, and its promises: unbiased, causal, inside documents."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from nanochat.errors import ConfigError
from nanochat.model import GPT, GPTConfig
from nanochat.objectives import IGNORED, NextToken, Step
from nanochat.objectives.mtp import KINDS, MultiTokenPrediction, future_targets
from nanochat.objectives.sampling import draw_positions, generator

EOT = 0
CONFIG = GPTConfig(
    vocab_size=23,
    dim=16,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    ffn_dim=24,
    seq_len=12,
    ternary=False,
    zero_init=False,
    embedding_std=0.7,
    softcap=4.0,
)


def batch(size=3, length=12, seed=0, eot_every=5):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, CONFIG.vocab_size, (size, length + 1), generator=generator)
    text[torch.rand(text.shape, generator=generator) < 1 / eot_every] = EOT
    tokens, targets = text[:, :-1].clone(), text[:, 1:].clone()
    targets[0, 3] = IGNORED
    return tokens, targets


def make(kind, config=CONFIG, dtype=torch.float64, **options):
    """A network and an objective whose every parameter matters."""
    options = {"token_fraction": 1.0, "schedule": "constant", **options}
    gpt, objective = GPT(config, seed=1), MultiTokenPrediction(config, seed=1, kind=kind, **options)
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in [*gpt.parameters(), *objective.parameters()]:
            if parameter.ndim == 1:
                parameter.mul_(torch.rand(parameter.shape, generator=source) + 0.5)
    return gpt.to(dtype), objective.to(dtype)


def step_of(gpt, tokens, targets, **fields):
    return Step.of(gpt, tokens, targets, eot_id=EOT, **fields)


def rms(x, gain):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def target_list(tokens, targets, shift):
    """(sequence, position, target) of the tokens shift + 1 ahead that lie in the position's own document."""
    found = []
    for b, t in itertools.product(range(tokens.shape[0]), range(tokens.shape[1])):
        ahead = t + shift
        if ahead >= tokens.shape[1] or targets[b, ahead] in (IGNORED, EOT):
            continue
        if EOT not in tokens[b, t + 1 : ahead + 1]:
            found.append((b, t, targets[b, ahead].item()))
    return found


def brute_force(gpt, objective, tokens, targets, rows=None):
    """The weighted sum of the full losses, one position at a time; `rows` restricts it to some (b, t)."""
    total_weight = sum(0.5**i for i in range(objective.tokens))
    hidden, loss = gpt.hidden(tokens), 0.0
    embedded = F.rms_norm(gpt.embedding.weight, (CONFIG.dim,), eps=1e-6)
    stream = list(hidden)  # per sequence (T, d)
    for i in range(objective.tokens):
        if objective.kind == "sequential":
            head, after = objective.heads[i], []
            for b, h in enumerate(stream):
                usable = tokens.shape[1] - (i + 1)  # positions that still have their next token
                left = rms(embedded[tokens[b, i + 1 :]], head.embedding_norm.weight)
                right = rms(h[:usable], head.hidden_norm.weight)
                x = torch.cat((left, right), -1) @ head.eh_proj.weight.T
                x = head.block(x[None], gpt.cos[:usable], gpt.sin[:usable])[0]
                after.append(rms(x, head.norm.weight))
            stream = after
        terms = []
        for b, t, target in target_list(tokens, targets, i + 1):
            if rows is not None and (b, t) not in rows:
                continue
            h = stream[b][t]
            if objective.kind == "parallel":
                head = objective.heads[i]
                a = head.proj.weight @ rms(h, head.norm.weight)
                h = h + a * torch.sigmoid(a)
            logits = 4.0 * torch.tanh(gpt.head_weight() @ h / 4.0)
            terms.append(logits.logsumexp(0) - logits[target])
        loss = loss + objective.weight * 0.5**i / total_weight * torch.stack(terms).mean()
    return loss


def gradients(*modules):
    return {
        f"{i}.{n}": p.grad.clone() for i, m in enumerate(modules) for n, p in m.named_parameters() if p.grad is not None
    }


def assert_close(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys()
    for name in expected:
        error = (got[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-12)
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient_against_brute_force(kind, tokens, tied):
    config = GPTConfig(**{**CONFIG.__dict__, "tied": tied, "head_std": 0.3})
    gpt, objective = make(kind, config, tokens=tokens, weight=0.4)
    data = batch()
    loss = objective(step_of(gpt, *data))
    loss.backward()
    got = gradients(gpt, objective)
    gpt.zero_grad(), objective.zero_grad()
    expected = brute_force(gpt, objective, *data)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close(got, gradients(gpt, objective))
    assert all(p.grad is not None and p.grad.any() for p in objective.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_trunk_gets_weight_times_the_mtp_gradient(kind):
    gpt, objective = make(kind, tokens=2, weight=0.2)
    data, main = batch(), NextToken(CONFIG)

    def trunk(*objectives):
        gpt.zero_grad()
        step = step_of(gpt, *data)
        torch.stack([o(step) for o in objectives]).sum().backward()
        return gradients(gpt)

    both, plain = trunk(main, objective), trunk(main)
    gpt.zero_grad()
    objective.weight = 1.0
    brute_force(gpt, objective, *data).backward()
    assert_close({n: both[n] - plain[n] for n in both}, {n: 0.2 * g for n, g in gradients(gpt).items()})


@pytest.mark.parametrize("kind", KINDS)
def test_kept_rows_are_the_only_ones(kind):
    gpt, objective = make(kind, tokens=2)
    tokens, targets = batch()
    kept = torch.tensor([[0, 1, 4, 7], [1, 2, 8, 9], [0, 3, 5, 6]])
    loss = objective(step_of(gpt, tokens, targets, kept=kept))
    rows = {(b, t) for b in range(3) for t in kept[b].tolist()}
    assert loss.item() == pytest.approx(brute_force(gpt, objective, tokens, targets, rows).item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_mean_over_all_draws_is_the_full_loss_and_gradient(kind):
    size, length = (4, 12) if kind == "sequential" else (1, 7)
    tokens, targets = batch(size, length, seed=3, eot_every=100)
    if kind == "sequential":
        targets[2] = IGNORED  # a sequence that no draw may waste itself on
    # so that 2 are drawn: of 3 sequences, or of the positions
    fraction = 0.5 if kind == "sequential" else 2 / 7
    gpt, objective = make(kind, token_fraction=fraction)
    draws = {}
    for micro_step in range(120):
        step = step_of(gpt, tokens, targets, micro_step=micro_step)
        gpt.zero_grad(), objective.zero_grad()
        loss = objective(step)
        key = round(loss.item(), 9)
        if key not in draws:
            loss.backward()
            draws[key] = (loss.item(), gradients(gpt, objective))
    n = 3 if kind == "sequential" else len(target_list(tokens, targets, 1))
    assert n > 2
    assert len(draws) == n * (n - 1) // 2
    mean = sum(loss for loss, _ in draws.values()) / len(draws)
    names = next(iter(draws.values()))[1]
    mean_gradients = {name: sum(g[name] for _, g in draws.values()) / len(draws) for name in names}
    _, full = make(kind)
    gpt.zero_grad()
    loss = full(step_of(gpt, tokens, targets))
    loss.backward()
    assert mean == pytest.approx(loss.item(), rel=1e-6)
    assert_close(mean_gradients, gradients(gpt, full), 1e-6)


def test_a_draw_is_uniform_over_the_subsets_of_the_valid():
    valid = torch.tensor([True, False, True, True, False, True])
    seen = [tuple(draw_positions(valid, 2, generator(7, step)).tolist()) for step in range(6000)]
    counts = {subset: seen.count(subset) for subset in itertools.combinations([0, 2, 3, 5], 2)}
    assert sum(counts.values()) == 6000
    # 1000 each with a standard deviation of 29
    assert all(abs(count - 1000) < 130 for count in counts.values())
    assert draw_positions(valid, 5, generator(1)).tolist()[0] == 0
    assert set(draw_positions(valid, 5, generator(1)).tolist()) >= {0, 2, 3, 5}


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_draws_depend_on_seed_and_micro_batch_only(kind):
    gpt, objective = make(kind, token_fraction=0.1)
    data = batch(8)

    def loss(**fields):
        torch.rand(3)  # the global generator does not matter
        return objective(step_of(gpt, *data, **fields)).item()

    assert loss(micro_step=4) == loss(micro_step=4, step=2, max_steps=9)
    losses = [loss(micro_step=m) for m in range(6)]
    assert len(set(losses)) > 3
    objective.seed += 1
    assert losses != [loss(micro_step=m) for m in range(6)]
    objective.seed -= 1
    state = torch.get_rng_state()
    MultiTokenPrediction(CONFIG, seed=3)
    loss_after = objective(step_of(gpt, *data, micro_step=4))
    assert torch.equal(state, torch.get_rng_state())
    assert loss_after.requires_grad


def test_targets_stay_inside_documents():
    tokens = torch.tensor([[0, 5, 6, 7, 0, 8, 9, 3]])
    targets = torch.tensor([[5, 6, 7, 0, 8, 9, 3, IGNORED]])
    gpt = GPT(CONFIG, seed=0)
    step = Step(gpt, tokens, targets, torch.zeros(1, 8, 16), torch.zeros(1, 8, 16), eot_id=0)
    one, two = future_targets(step, 2)
    no = IGNORED
    assert one.tolist() == [[6, 7, no, no, 9, 3, no, no]]
    assert two.tolist() == [[7, no, no, no, 3, no, no, no]]
    step.eot_id = None
    one, two = future_targets(step, 2)
    assert one.tolist() == [[6, 7, 0, 8, 9, 3, no, no]]
    assert two.tolist() == [[7, 0, 8, 9, 3, no, no, no]]


def test_the_sequential_head_never_sees_what_it_predicts():
    gpt, objective = make("sequential", tokens=2)
    tokens, _ = batch(1)

    def streams(tokens):
        h = gpt.hidden(tokens)
        out = [h]
        for i, head in enumerate(objective.heads):
            h = head(h, gpt.embed(tokens.roll(-(i + 1), 1)), gpt.cos, gpt.sin)
            out.append(h)
        return out

    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % CONFIG.vocab_size
    for depth, (before, after) in enumerate(zip(streams(tokens), streams(changed), strict=True)):
        # position t of depth i has read up to token t + i, and predicts token t + i + 1
        first = 7 - depth
        assert torch.equal(before[0, :first], after[0, :first])
        assert (before[0, first] != after[0, first]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_weight_zero_is_the_plain_run_to_the_last_bit(kind):
    def train(with_mtp):
        torch.manual_seed(9)
        gpt = GPT(CONFIG, seed=1)
        objectives = [NextToken(CONFIG)]
        if with_mtp:
            objectives.append(MultiTokenPrediction(CONFIG, seed=1, kind=kind, tokens=2, weight=0.0))
        optimizer = torch.optim.SGD([p for m in (gpt, *objectives) for p in m.parameters()], 0.3)
        losses = []
        for seed in range(4):
            step = step_of(gpt, *batch(seed=seed), micro_step=seed)
            loss = torch.stack([o(step) for o in objectives]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, gpt.state_dict(), torch.rand(1)

    (plain_losses, plain, r1), (losses, state, r2) = train(False), train(True)
    assert losses == plain_losses
    assert r1 == r2
    assert all(torch.equal(plain[name], state[name]) for name in plain)


def test_parameters():
    names = {n: tuple(p.shape) for n, p in MultiTokenPrediction(CONFIG, tokens=2).named_parameters()}
    assert names["heads.1.eh_proj.weight"] == (16, 32)
    assert names["heads.0.block.attention.q.weight"] == (16, 16)
    assert not list(MultiTokenPrediction(CONFIG, kind="weights-only").parameters())
    assert len(list(MultiTokenPrediction(CONFIG, kind="parallel", tokens=3).parameters())) == 6


def test_initial_weights_follow_the_seed():
    one, two, other = (MultiTokenPrediction(CONFIG, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not torch.equal(one["heads.0.eh_proj.weight"], other["heads.0.eh_proj.weight"])


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        ("constant", 0.99, [0.4 * 2 / 3, 0.4 / 3]),
        ("deepseek", 0.5, [0.4 * 2 / 3, 0.4 / 3]),
        ("deepseek", 0.7, [0.4 * 2 / 9, 0.4 / 9]),
        ("reverse", 0.0, [0.4 * 2 / 3, 0.4 / 3]),
        ("reverse", 1 / 6, [0.4 * 2 / 3, 0.2 / 3]),
        ("reverse", 1 / 3, [0.4 * 2 / 3, 0.0]),
        ("reverse", 1 / 2, [0.4 / 3, 0.0]),
        ("reverse", 0.67, [0.0, 0.0]),
    ],
)
def test_schedules(schedule, progress, expected):
    objective = MultiTokenPrediction(CONFIG, tokens=2, weight=0.4, schedule=schedule)
    assert objective.weights(round(600 * progress), 600) == pytest.approx(expected, abs=0.01)


def test_the_weight_reaches_the_loss():
    gpt, objective = make("weights-only", tokens=2, schedule="reverse")
    data = batch()
    step = step_of(gpt, *data, step=40, max_steps=100)
    objective(step)
    assert set(step.metrics) == {"mtp/loss_2"}  # the farther one has faded
    assert objective(step_of(gpt, *data, step=90, max_steps=100)).item() == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_the_losses_without_their_weights(kind):
    gpt, objective = make(kind, tokens=2, weight=0.4)
    tokens, targets = batch()
    step = step_of(gpt, tokens, targets)
    objective(step)
    objective.weight = 1.5  # the losses with the weights 1 and 1/2
    both = brute_force(gpt, objective, tokens, targets)
    objective.weight, objective.tokens = 1.0, 1
    near = brute_force(gpt, objective, tokens, targets)
    assert step.metrics["mtp/loss_2"].item() == pytest.approx(near.item(), rel=1e-5)
    assert step.metrics["mtp/loss_3"].item() == pytest.approx(2 * (both - near).item(), rel=1e-5)


def test_no_valid_target_is_zero():
    gpt, objective = make("sequential")
    tokens, _ = batch()
    loss = objective(step_of(gpt, tokens, torch.full_like(tokens, IGNORED)))
    loss.backward()
    assert loss.item() == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast(kind):
    config = GPTConfig(**{**CONFIG.__dict__, "ternary": True, "dim": 32, "vocab_size": 61})
    gpt, objective = make(kind, config, torch.float32, tokens=2)
    data = batch()
    full = objective(step_of(gpt, *data)).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(step_of(gpt, *data))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(full, rel=0.03)
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "serial"}, "mtp.kind='serial'"),
        ({"tokens": 0}, "mtp.tokens=0"),
        ({"tokens": 12}, "from 1 to 11"),
        ({"weight": -0.1}, "mtp.weight=-0.1"),
        ({"schedule": "cosine"}, "mtp.schedule='cosine'"),
        ({"token_fraction": 0.0}, "mtp.token_fraction=0.0"),
        ({"token_fraction": 1.5}, "mtp.token_fraction=1.5"),
    ],
)
def test_impossible_options(options, words):
    with pytest.raises(ConfigError, match=words):
        MultiTokenPrediction(CONFIG, **options)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_beside_the_next_token_it_adds_its_own_gradient(kind, tied):
    """With the next-token term, whose matrix gradient it shares, minus without: MTP's own, at every parameter."""
    config = GPTConfig(**{**CONFIG.__dict__, "tied": tied, "head_std": 0.3})
    gpt, objective = make(kind, config, tokens=2, weight=0.4)
    main, found = NextToken(config), []
    for objectives in ([main, objective], [main], [objective]):
        step = step_of(gpt, *batch())
        torch.stack([term(step) for term in objectives]).sum().backward()
        found.append(gradients(gpt, objective))
        gpt.zero_grad(), objective.zero_grad()
    both, plain, own = found
    assert_close({name: g - plain.get(name, 0.0) for name, g in both.items()}, own)
