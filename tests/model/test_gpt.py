"""The network against a float64 version written with loops, and its promises: causality, sizes, initial loss."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanochat.errors import ConfigError, UserError
from nanochat.model import GPT, GPTConfig
from nanochat.model.attention import causal_attention
from nanochat.model.rotary import apply_rope, rope_table

SMALL = {
    "vocab_size": 61,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "ffn_dim": 48,
    "seq_len": 24,
}

# d, layers, heads, kv heads, ffn, vocabulary, sequence, tied, millions of parameters: the table of presets
PRESETS = {
    "tiny": (256, 4, 4, 4, 512, 4096, 256, True, 3.67),
    "d20": (256, 6, 4, 4, 768, 50257, 256, True, 17.98),
    "test-8bit": (256, 4, 8, 8, 512, 50257, 256, False, 28.36),
    "nano-125m": (768, 12, 12, 12, 2176, 50257, 512, True, 127.1),
    "d20-e3-full": (768, 24, 12, 12, 2688, 50257, 2048, False, 282.5),
    "nano-1b": (2048, 20, 16, 16, 5504, 50257, 1024, True, 1115.0),
    "medium-3b": (2048, 28, 32, 8, 7168, 50257, 4096, True, 1630.0),
    "large-7b": (4096, 32, 32, 8, 11008, 128000, 4096, True, 6200.0),
}


def preset(name: str) -> GPTConfig:
    d, layers, heads, kv, ffn, vocabulary, length, tied, _ = PRESETS[name]
    return GPTConfig(
        vocab_size=vocabulary, dim=d, n_layers=layers, n_heads=heads, n_kv_heads=kv, ffn_dim=ffn,
        seq_len=length, tied=tied,
    )  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = GPT(preset(name))
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(PRESETS[name][-1], rel=0.01)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dim", "vocabulary"), [(256, 4096), (256, 50257), (768, 50257), (2048, 50257)])
def test_initial_loss_is_that_of_a_uniform_guess(dim, vocabulary, tied):
    heads = dim // 64
    model = GPT(
        GPTConfig(
            vocab_size=vocabulary,
            dim=dim,
            n_layers=1,
            n_heads=heads,
            n_kv_heads=heads,
            ffn_dim=256,
            tied=tied,
        ),
        seed=0,
    )
    tokens = torch.randint(vocabulary, (1, 65), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = F.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:]).item()
    assert abs(loss - math.log(vocabulary)) < 0.3


def norm(x, gain=None):
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return x if gain is None else x * gain.double()


def rotate(x, position, base):
    half = x.shape[-1] // 2
    out = x.clone()
    for i in range(half):
        angle = position * base ** (-2 * i / x.shape[-1])
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def reference_logits(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """(T,) -> (T, V) in float64, one position and one head at a time; the model's shipped weights."""
    c = model.config

    def matrix(linear):
        return linear.shipped_weight().double()

    x = model.embedding.weight.double()[tokens]
    if c.embedding_norm:
        x = norm(x)
    for block in model.blocks:
        a = block.attention
        h = norm(x, a.norm.weight)
        q, k, v = h @ matrix(a.q).T, h @ matrix(a.k).T, h @ matrix(a.v).T
        y = torch.zeros(len(tokens), c.n_heads * c.head_dim, dtype=torch.float64)
        for head in range(c.n_heads):
            kv = head // (c.n_heads // c.n_kv_heads)
            sq, sk = (
                slice(head * c.head_dim, (head + 1) * c.head_dim),
                slice(kv * c.head_dim, (kv + 1) * c.head_dim),
            )
            qs, ks = q[:, sq], k[:, sk]
            if c.qk_norm:
                qs, ks = norm(qs, a.q_norm.weight), norm(ks, a.k_norm.weight)
            for t in range(len(tokens)):
                query = rotate(qs[t], t, c.rope_base)
                scores = torch.stack([query @ rotate(ks[s], s, c.rope_base) for s in range(t + 1)])
                y[t, sq] = torch.softmax(scores / math.sqrt(c.head_dim), 0) @ v[: t + 1, sk]
        if c.sub_norm:
            y = norm(y, a.sub_norm.weight)
        x = x + y @ matrix(a.o).T
        f = block.feedforward
        h = norm(x, f.norm.weight)
        gate = h @ matrix(f.gate).T
        gate = gate * torch.sigmoid(gate) if c.activation == "silu" else gate.clamp_min(0) ** 2
        h = gate * (h @ matrix(f.up).T)
        if c.sub_norm:
            h = norm(h, f.sub_norm.weight)
        x = x + h @ matrix(f.down).T
    logits = norm(x, model.norm.weight) @ model.head_weight().double().T
    return c.softcap * torch.tanh(logits / c.softcap) if c.softcap else logits


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"tied": False, "head_std": 0.05},
        {"qk_norm": False, "embedding_norm": False},
        {"sub_norm": True, "activation": "relu2", "softcap": 3.0},
        {"n_kv_heads": 4, "weight_block": 0},
        {"n_kv_heads": 1, "ternary": False, "rope_base": 500.0},
    ],
)
def test_logits_against_float64_loops(switches):
    config = GPTConfig(**{**SMALL, "zero_init": False, "activation_scale": "none", "embedding_std": 0.5, **switches})
    model = GPT(config, seed=3)
    with torch.no_grad():  # gains that are not all alike
        for p in model.parameters():
            if p.ndim == 1:
                p.mul_(torch.rand(p.shape, generator=torch.Generator().manual_seed(p.numel())) + 0.5)
    tokens = torch.randint(61, (17,), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        got, expected = model(tokens[None])[0].double(), reference_logits(model, tokens)
    assert (got - expected).abs().max() < 2e-5 * expected.abs().max()


def test_nothing_before_a_changed_token_moves():
    model = GPT(GPTConfig(**SMALL, zero_init=False), seed=0)
    tokens = torch.randint(61, (1, 20), generator=torch.Generator().manual_seed(5))
    changed = tokens.clone()
    changed[0, 11] = (changed[0, 11] + 1) % 61
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:11], after[:11])
    assert (before[11:] != after[11:]).any(-1).all()


@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (1, 9), (4, 9)])
def test_attention_with_a_prefix(queries, keys):
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(2, queries, 4, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, keys, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    got = causal_attention(q, k, v)
    for head in range(4):
        for t in range(queries):
            seen = keys - queries + t + 1
            scores = torch.einsum("bd,bsd->bs", q[:, t, head], k[:, :seen, head // 2]) / math.sqrt(8)
            expected = torch.einsum("bs,bsd->bd", scores.softmax(-1), v[:, :seen, head // 2])
            assert torch.allclose(got[:, t, head], expected, atol=1e-12)


def test_rope_keeps_lengths_and_depends_on_the_distance_only():
    cos, sin = rope_table(4096, 64, 1e5)
    x = torch.randn(1, 4096, 1, 64, generator=torch.Generator().manual_seed(7))
    turned = apply_rope(x[:, :1].expand_as(x), cos, sin)[0, :, 0]
    assert torch.allclose(turned.norm(dim=-1), x[0, 0].norm().expand(4096), rtol=1e-5)
    products = (turned[:-100] * turned[100:]).sum(-1)
    assert torch.allclose(products, products[0].expand_as(products), rtol=1e-3)


def test_the_seed_decides_the_weights():
    one, two, other = (GPT(GPTConfig(**SMALL), seed=s) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)


def test_too_long_a_sequence_is_one_sentence():
    with pytest.raises(UserError, match="25 tokens is longer than the model's 24"):
        GPT(GPTConfig(**SMALL)).hidden(torch.zeros(1, 25, dtype=torch.long))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dim": 250}, "not divisible by model.n_heads"),
        ({"n_kv_heads": 3}, "not divisible by model.n_kv_heads"),
        ({"dim": 4}, "must be even"),
        ({"n_layers": 0}, "at least 1"),
        ({"vocab_size": "many"}, "whole number"),
        ({"activation": "gelu"}, "unknown"),
        ({"activation_scale": "row"}, "unknown"),
        ({"softcap": -1.0}, "negative"),
        ({"weight_block": -1}, "positive"),
    ],
)
def test_impossible_shapes(values, words):
    with pytest.raises(ConfigError, match=words):
        GPTConfig(**{**SMALL, **values})


def test_config_round_trip(tmp_path):
    config = GPTConfig(**SMALL, qk_norm=False, softcap=15.0)
    config.to_json(tmp_path / "model.json")
    assert GPTConfig.from_json(tmp_path / "model.json") == config
    (tmp_path / "model.json").write_text('{"dimm": 3}')
    with pytest.raises(UserError, match="dimm"):
        GPTConfig.from_json(tmp_path / "model.json")
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(UserError, match="not a readable"):
        GPTConfig.from_json(tmp_path / "model.json")
