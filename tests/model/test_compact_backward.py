"""The compact backward against autograd on a network with detached tokens, at every parameter."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import wrap_torch_function
from torch.utils._python_dispatch import TorchDispatchMode

import nanochat.model.attention as attention_module
import nanochat.model.feedforward as feedforward_module
from nanochat.model import GPT, GPTConfig
from nanochat.model.attention import QUERY_BLOCK, causal_attention
from nanochat.model.compact_backward import KeptRows, compact
from nanochat.model.hyper_connections import expand, reduce
from nanochat.model.value_embeddings import make_lane
from nanochat.objectives import linear_cross_entropy

BASE = GPTConfig(
    vocab_size=61,
    dim=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=48,
    seq_len=24,
    zero_init=False,
    embedding_std=0.5,
    weight_block=16,
)


def network(config):
    """A network whose gains are not all alike."""
    gpt = GPT(config, seed=3)
    source = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if parameter.ndim == 1 or name.endswith(".phi"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=source))
    # the maps of the streams sum over all that is in them: in float32 the two sums differ by their rounding
    return gpt.double() if config.streams > 1 else gpt


def data(config, batch=2, length=None, seed=0):
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (batch, length or config.seq_len), generator=source)
    return tokens, torch.randint(config.vocab_size, tokens.shape, generator=source)


def some_positions(batch, length, count, seed=1):
    source = torch.Generator().manual_seed(seed)
    return torch.rand(batch, length, generator=source).topk(count, 1).indices.sort(1).values


def cut(x, positions):
    """Detach the tokens (axes -3 or 1 of (B, T, ...)) that are not at these positions."""
    keep = torch.zeros(x.shape[:2], dtype=torch.bool).scatter_(1, positions, True)
    return torch.where(keep.view(*keep.shape, *[1] * (x.ndim - 2)), x, x.detach())


def oracle_hidden(gpt, tokens, positions, monkeypatch):
    """The definition: ordinary autograd with the dropped tokens detached.

    In the embedding, in the stream after every sub-layer, and in every layer's k (after its norm and RoPE) and v.
    """
    inner = attention_module.causal_attention

    def cut_streams(x):
        return torch.stack([cut(s, positions) for s in x]) if gpt.config.streams > 1 else cut(x, positions)

    cos, sin = gpt.cos[: tokens.shape[1]], gpt.sin[: tokens.shape[1]]
    x, lane = cut(gpt.embed(tokens), positions), None
    if gpt.value_embedding is not None:
        lane = make_lane(cut(gpt.value_embedding(tokens), positions), gpt.config)
    square = None if lane is None else lane.square
    if gpt.config.streams > 1:
        x = expand(x, gpt.config.streams)
    with monkeypatch.context() as patch:
        patch.setattr(
            attention_module, "causal_attention", lambda q, k, v: inner(q, cut(k, positions), cut(v, positions))
        )
        for block in gpt.blocks:
            if gpt.config.streams > 1:
                x = cut_streams(block.hyper_attention(x, lambda u, b=block: b.attention(u, cos, sin, lane=lane)))
                x = cut_streams(block.hyper_feedforward(x, lambda u, b=block: b.feedforward(u, square)))
            else:
                x = cut_streams(x + block.attention(x, cos, sin, lane=lane))
                x = cut_streams(x + block.feedforward(x, square))
    return gpt.norm(reduce(x) if gpt.config.streams > 1 else x, square)


def gradients(gpt, hidden, targets, positions):
    """The gradients of the mean loss of the kept tokens."""
    gpt.zero_grad()
    if gpt.kept_rows is not None:
        gpt.kept_rows.positions = positions
    kept_loss(gpt, hidden, targets, positions).backward()
    return {name: p.grad.clone() for name, p in gpt.named_parameters() if p.requires_grad}


def kept_loss(gpt, hidden, targets, positions):
    """The mean loss of the tokens at these positions."""
    cap = gpt.config.softcap
    return linear_cross_entropy(
        hidden, gpt.head_weight(), targets, softcap=cap, selector=lambda scores: positions, chunk=10**6
    ).loss


def check_against_the_oracle(gpt, monkeypatch, count, batch=2, length=None, tolerance=1e-5):
    tokens, targets = data(gpt.config, batch, length)
    positions = some_positions(batch, tokens.shape[1], count)
    expected = gradients(gpt, oracle_hidden(gpt, tokens, positions, monkeypatch), targets, positions)
    gpt.kept_rows = KeptRows()
    hidden = gpt.hidden(tokens)
    got = gradients(gpt, hidden, targets, positions)
    gpt.kept_rows = None
    assert torch.equal(hidden, gpt.hidden(tokens))
    for name, value in expected.items():
        # while the streams are equal, and after the last sub-layer, some maps have no gradient but rounding
        no_gradient = ".hyper_" in name and value.norm() < 1e-12
        error = ((got[name] - value).norm() / (1.0 if no_gradient else value.norm())).item()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"tied": False, "head_std": 0.3},
        {"n_kv_heads": 1, "sub_norm": True, "activation": "relu2"},
        {"n_kv_heads": 4, "qk_norm": False, "embedding_norm": False},
        {"activation_scale": "block", "softcap": 5.0},
        {"ternary": False},
        {"streams": 2},
        {"streams": 2, "stream_maps": "dynamic"},
        {"value_embeddings": 1},
        {"value_embeddings": 2, "value_embedding_layers": (0, 2), "value_embedding_width": 8},
        {"value_embeddings": 1, "value_gate": "input", "value_embedding_std": 0.5},
        {"value_embeddings": 1, "streams": 2},
    ],
    ids=str,
)
def test_every_gradient_is_the_oracles(switches, monkeypatch):
    check_against_the_oracle(network(replace(BASE, **switches)), monkeypatch, count=14)


@pytest.mark.parametrize("count", [1, 2, 23, 24])
def test_any_count(count, monkeypatch):
    check_against_the_oracle(network(BASE), monkeypatch, count)


def test_more_queries_than_fit_a_block(monkeypatch):
    config = replace(BASE, n_layers=2, seq_len=3 * QUERY_BLOCK)
    check_against_the_oracle(network(config), monkeypatch, count=2 * QUERY_BLOCK - 7)


def test_sequences_shorter_than_the_model(monkeypatch):
    check_against_the_oracle(network(BASE), monkeypatch, count=7, batch=3, length=13)


def test_the_block_is_listed_once(monkeypatch):
    """Another activation, or no norm of q: one change in one place, and both passes follow."""
    monkeypatch.setattr(feedforward_module.F, "silu", F.relu)
    check_against_the_oracle(network(BASE), monkeypatch, count=14)
    monkeypatch.undo()
    gpt = network(BASE)
    for block in gpt.blocks:
        block.attention.q_norm.forward = lambda q: q
        block.attention.q_norm.weight.requires_grad_(False)
    check_against_the_oracle(gpt, monkeypatch, count=14)


def test_without_a_choice_all_rows_are_kept():
    gpt = network(BASE)
    tokens, targets = data(BASE)
    found = []
    for kept in (None, KeptRows(), KeptRows(torch.arange(24).expand(2, 24))):
        gpt.zero_grad()
        gpt.kept_rows = kept
        linear_cross_entropy(gpt.hidden(tokens), gpt.head_weight(), targets).loss.backward()
        found.append([p.grad for p in gpt.parameters()])
    for other in found[1:]:
        assert all((a - b).norm() <= 1e-5 * a.norm() for a, b in zip(found[0], other, strict=True))


def test_accumulation_adds_up():
    gpt = network(BASE)
    parts = []
    for micro in range(2):
        tokens, targets = data(BASE, seed=micro)
        positions = some_positions(2, 24, 9, seed=micro)
        gpt.kept_rows = KeptRows()
        parts.append(gradients(gpt, gpt.hidden(tokens), targets, positions))
    gpt.zero_grad()
    for micro in range(2):
        tokens, targets = data(BASE, seed=micro)
        gpt.kept_rows = KeptRows(some_positions(2, 24, 9, seed=micro))
        kept_loss(gpt, gpt.hidden(tokens), targets, gpt.kept_rows.positions).backward()
    for name, parameter in gpt.named_parameters():
        assert torch.allclose(parameter.grad, parts[0][name] + parts[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("streams", [1, 2])
def test_bf16_autocast(streams, monkeypatch):
    gpt = network(replace(BASE, streams=streams)).float()
    tokens, targets = data(BASE)
    positions = some_positions(2, 24, 14)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(gpt, oracle_hidden(gpt, tokens, positions, monkeypatch), targets, positions)
        gpt.kept_rows = KeptRows()
        hidden = gpt.hidden(tokens)
    # as a training loop does it: backward outside of the context
    got = gradients(gpt, hidden, targets, positions)
    exact = gradients(gpt, gpt.hidden(tokens), targets, positions)

    def error(a, b):
        return sum((a[n] - b[n]).square().sum() for n in b).sqrt() / sum(b[n].square().sum() for n in b).sqrt()

    assert all(g.dtype == torch.float32 for g in got.values())
    assert error(got, expected) <= 0.05
    assert error(got, exact) <= 1.5 * error(expected, exact)


class Products(TorchDispatchMode):
    """The shapes of all matrix products inside the block."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default and args[0].shape[0] > 1:  # one row: a sum of gains' gradients
            self.shapes.append((*args[0].shape, args[1].shape[1]))
        return function(*args, **(kwargs or {}))


def test_the_backwards_products_have_kept_rows_only():
    gpt = network(replace(BASE, n_layers=1))
    gpt.kept_rows = KeptRows(some_positions(2, 24, 7))
    hidden = gpt.hidden(data(BASE)[0])
    with Products() as products:
        hidden.sum().backward()
    rows = 2 * 7
    # (output width, input width) of q, k, v, o, gate, up, down
    matrices = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    expected = [(rows, out, into) for out, into in matrices] + [(out, rows, into) for out, into in matrices]
    assert sorted(products.shapes) == sorted(expected)


def test_activations_are_freed_and_a_second_backward_raises():
    gpt = network(BASE)
    gpt.kept_rows = KeptRows(some_positions(2, 24, 7))
    hidden = gpt.hidden(data(BASE)[0])
    hidden.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="single time"):
        hidden.sum().backward()


def test_inference_does_not_see_the_filter():
    gpt = network(BASE)
    tokens, _ = data(BASE)
    with torch.no_grad():
        plain = gpt.hidden(tokens)
        gpt.kept_rows = KeptRows(some_positions(2, 24, 7))
        assert torch.equal(gpt.hidden(tokens), plain)


def test_attention_backward_against_dense_scores():
    source = torch.Generator().manual_seed(0)
    q = torch.randn(2, 9, 4, 8, generator=source, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 9, 2, 8, generator=source, dtype=torch.float64, requires_grad=True) for _ in range(2))
    kept = KeptRows(some_positions(2, 9, 4))
    y = compact(causal_attention, kept, q, k, v)
    upstream = torch.randn(y.shape, generator=source, dtype=torch.float64)
    y.backward(upstream)
    got = [t.grad for t in (q, k, v)]
    mask = torch.zeros(2, 9, 1, 1).scatter_(1, kept.positions[..., None, None], 1.0)
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) / 8**0.5
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    out = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v.repeat_interleave(2, 2))
    expected = torch.autograd.grad(out, (q, k, v), upstream * mask)
    for a, b in zip(got, expected, strict=True):
        assert (a - b * mask).norm() <= 1e-6 * b.norm()


def test_any_wrapped_function_goes_through_torchs_own_backward():
    source = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 6, 4, generator=source, requires_grad=True) for _ in range(2))
    gain = torch.randn(4, generator=source, requires_grad=True)
    bias = torch.randn(4, generator=source, requires_grad=True)

    @wrap_torch_function(lambda a: (a,))
    def swap(a):
        first, second = a.chunk(2, -1)
        return torch.cat((second, first), -1)

    def function(x, y):
        a, b = (x * gain).chunk(2, dim=-1)
        z = torch.cat([b.sigmoid(), a], dim=-1) - swap(y).exp() * 0.5
        z = F.layer_norm(z, (4,), weight=gain, bias=bias) + x
        return F.linear(z.unflatten(-1, (2, 2)).flatten(-2), torch.eye(4) + 0.1, bias) / (1.0 + y.square())

    kept = KeptRows(some_positions(2, 6, 3))
    mask = torch.zeros(2, 6, 1).scatter_(1, kept.positions[..., None], 1.0)
    out = compact(function, kept, x, y)
    assert torch.equal(out, function(x, y))
    upstream = torch.randn(out.shape, generator=source)
    got = torch.autograd.grad(out, (x, y, gain, bias), upstream)
    expected = torch.autograd.grad(function(x, y), (x, y, gain, bias), upstream * mask)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))


def test_what_mixes_the_tokens_is_refused():
    x = torch.randn(2, 4, 3, requires_grad=True)
    with pytest.raises(TypeError, match="flatten mixes the tokens"):
        compact(lambda x: x.flatten(0, 1), KeptRows(), x)


def test_constants_have_no_gradient():
    x = torch.randn(1, 4, 3, requires_grad=True)
    gain = torch.randn(3, requires_grad=True)
    table = torch.randn(1, 4, 3)

    def function(x, t):
        return x * t.cos() + x + F.layer_norm(t, (3,), weight=gain)

    out = compact(function, KeptRows(torch.tensor([[1, 3]])), x, table)
    out.sum().backward()
    assert torch.allclose(gain.grad, F.layer_norm(table, (3,))[0, [1, 3]].sum(0), atol=1e-6)
    assert torch.allclose(x.grad[0, [1, 3]], table[0, [1, 3]].cos() + 1)
    assert not x.grad[0, [0, 2]].any()
