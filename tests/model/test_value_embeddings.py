"""Value embeddings: the compact lane against the wide network that a file holds, in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nanochat.errors import ConfigError
from nanochat.inference.engine import Decoder
from nanochat.model import GPT, GPTConfig
from nanochat.model.norm import wide_rms_norm
from nanochat.model.rotary import apply_rope
from nanochat.objectives import linear_cross_entropy
from nanochat.objectives.mtp import SequentialHead

BASE = GPTConfig(
    vocab_size=61, dim=32, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=48, seq_len=24, zero_init=False,
    embedding_std=0.5, weight_block=16, value_embeddings=1, value_embedding_std=0.7, activation_scale="none",
)  # fmt: skip
FORMS = [
    {},
    {"value_embeddings": 2},
    {"value_embedding_layers": (1,), "value_embedding_width": 8},
    {"value_embeddings": 2, "value_embedding_layers": (0, 2), "value_embedding_width": 8, "tied": False},
]


def network(**switches) -> GPT:
    """Its gains differ, and some are negative."""
    gpt = GPT(replace(BASE, **switches), seed=1)
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in gpt.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=source))
    return gpt.double()


def some_tokens(config, batch=2, seed=0) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, config.seq_len), generator=torch.Generator().manual_seed(seed))


def wide_norm(x, gain, eps, lane_gain):
    """RMS norm of the stream with its lane; the lane's own gain is a number."""
    gain = torch.cat((gain, gain.new_full((x.shape[-1] - len(gain),), lane_gain)))
    return F.rms_norm(x, gain.shape, gain, eps)


def wide_hidden(gpt, tokens):
    """The network that the file holds: a plain transformer of width d + lane, wide matrices, ordinary RMS norms."""
    config = gpt.config
    d, lane, width = config.dim, config.lane_width, config.value_width

    def read(linear, block=None):  # a matrix that reads the wide stream
        weight = linear.shipped_weight()
        wide = torch.zeros(weight.shape[0], d + lane, dtype=weight.dtype)
        wide[:, :d] = weight
        if block is not None:
            start = d + block.start
            gains = block.shipped_gain().repeat_interleave(config.head_dim)
            wide[torch.arange(width), start + torch.arange(width)] = gains
        return wide

    def write(linear):  # a matrix that writes to it
        weight = linear.shipped_weight()
        return torch.cat((weight, weight.new_zeros(lane, weight.shape[1])))

    x = torch.cat((gpt.embed(tokens), gpt.value_embedding.weight[tokens]), -1)
    cos, sin = gpt.cos[: tokens.shape[1]], gpt.sin[: tokens.shape[1]]
    for block in gpt.blocks:
        attention, feedforward = block.attention, block.feedforward
        h = wide_norm(x, attention.norm.weight, config.norm_eps, 1.0)
        q, k, v = (
            (h @ weight.T).unflatten(-1, (-1, config.head_dim))
            for weight in (read(attention.q), read(attention.k), read(attention.v, attention.value))
        )
        q, k = (apply_rope(norm(t), cos, sin) for norm, t in ((attention.q_norm, q), (attention.k_norm, k)))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(-2)
        x = x + y @ write(attention.o).T
        h = wide_norm(x, feedforward.norm.weight, config.norm_eps, 0.0)
        h = F.silu(h @ read(feedforward.gate).T) * (h @ read(feedforward.up).T)
        x = x + h @ write(feedforward.down).T
    assert torch.equal(x[..., d:], gpt.value_embedding.weight[tokens])  # no layer writes to the lane
    return wide_norm(x, gpt.norm.weight, config.norm_eps, 0.0)[..., :d]


@pytest.mark.parametrize("switches", FORMS, ids=str)
def test_the_compact_form_is_the_wide_network(switches):
    gpt = network(**switches)
    tokens = some_tokens(gpt.config)
    found, expected = gpt.hidden(tokens), wide_hidden(gpt, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    upstream = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    parameters = dict(gpt.named_parameters())
    ours, theirs = (
        torch.autograd.grad((hidden * upstream).sum(), list(parameters.values()), allow_unused=True)
        for hidden in (found, expected)
    )
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        if a is None or b is None:
            assert a is b, name
            continue
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=name)


def test_every_parameter_of_the_lane_learns():
    gpt = network(value_embeddings=2)
    tokens = some_tokens(gpt.config)
    linear_cross_entropy(gpt.hidden(tokens), gpt.head_weight(), tokens.roll(-1, 1)).loss.backward()
    assert gpt.value_embedding.weight.grad[tokens.unique()].norm(dim=1).min() > 0
    for block in gpt.blocks:
        assert block.attention.value.gain.grad.abs().min() > 0


@pytest.mark.parametrize("with_square", [True, False])
def test_the_wide_norm_s_gradient(with_square):
    source = torch.Generator().manual_seed(0)
    x, square, weight = (torch.randn(s, dtype=torch.float64, generator=source) for s in ((3, 4, 8), (3, 4, 1), (8,)))
    inputs = (x, square.square() if with_square else None, weight)
    for tensor in inputs:
        if tensor is not None:
            tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: wide_rms_norm(*args, 20, 1e-6), inputs)


def test_the_other_weights_are_those_of_the_same_seed_without():
    plain, ours = GPT(replace(BASE, value_embeddings=0), seed=5), GPT(BASE, seed=5)
    weights = ours.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize("switches", [*FORMS, {"value_gate": "input"}, {"streams": 2}], ids=str)
def test_decoding_step_by_step_is_the_whole_pass(switches):
    gpt = network(**switches)
    tokens = some_tokens(gpt.config, batch=1)
    decoder = Decoder(gpt)
    parts = [decoder.hidden(tokens[:, i : i + n]) for i, n in ((0, 5), (5, 1), (6, 1), (7, 17))]
    torch.testing.assert_close(torch.cat(parts, 1), gpt.hidden(tokens), rtol=1e-9, atol=1e-9)


def test_a_gate_of_the_input_leaves_the_norms_alone():
    gpt = network(value_gate="input")
    assert gpt.config.lane_width == 0
    with torch.no_grad():
        gpt.value_embedding.weight.zero_()
    plain = GPT(replace(BASE, value_embeddings=0), seed=1).double()
    plain.load_state_dict({name: gpt.state_dict()[name] for name in plain.state_dict()})
    tokens = some_tokens(gpt.config)
    assert torch.equal(gpt.hidden(tokens), plain.hidden(tokens))


def test_a_head_of_multi_token_prediction_counts_the_lane():
    """Its first norm sees the next token's lane, the others an empty one: as in the file's wide block."""
    config = replace(BASE, n_layers=1)
    gpt, head = GPT(config, seed=0).double(), SequentialHead(config, torch.Generator().manual_seed(0)).double()
    tokens = some_tokens(config)
    lane = gpt.lane(tokens)
    seen = {}
    for name, norm in head.named_modules():
        if name.endswith("norm") and "q_" not in name and "k_" not in name:
            norm.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args, out)}))
    head(gpt.hidden(tokens), gpt.embed(tokens), gpt.cos, gpt.sin, square=lane.square)
    assert set(seen) == {"embedding_norm", "hidden_norm", "block.attention.norm", "block.feedforward.norm", "norm"}
    for name, (args, out) in seen.items():
        x = args[0]
        rest = lane.values if name == "embedding_norm" else torch.zeros_like(lane.values)
        gain = dict(head.named_modules())[name].weight
        expected = wide_norm(torch.cat((x, rest), -1), gain, config.norm_eps, 0.0)[..., : config.dim]
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("switches", "sentence"),
    [
        ({"value_embeddings": 3}, r"model.value_embeddings=3 must be 0, 1 or 2"),
        ({"value_embedding_layers": (3,)}, r"model.value_embedding_layers=\[3\] must be layers from 0 to 2"),
        ({"value_embedding_layers": (1, 1)}, r"must name each layer once"),
        ({"value_embeddings": 2, "value_embedding_layers": (1,)}, r"more tables than .* layers \(1\)"),
        ({"value_embedding_width": 12}, r"must be a multiple of the head's width 8, at most 16"),
        ({"value_embedding_width": 24}, r"must be a multiple of the head's width 8, at most 16"),
        ({"value_gate": "dynamic"}, r"model.value_gate='dynamic' is unknown"),
    ],
    ids=str,
)
def test_mistakes(switches, sentence):
    with pytest.raises(ConfigError, match=sentence):
        replace(BASE, **switches)


def test_json_keeps_the_layers(tmp_path):
    config = replace(BASE, value_embedding_layers=(0, 2))
    config.to_json(tmp_path / "model.json")
    assert GPTConfig.from_json(tmp_path / "model.json") == config
