"""Hyper-connections against their formulas in float64, and the properties that they are for."""

from __future__ import annotations

import dataclasses
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from nanochat.errors import ConfigError
from nanochat.inference.engine import Decoder, inference_copy
from nanochat.model import GPT, GPTConfig
from nanochat.model.hyper_connections import HyperConnection, expand, permutation_table, reduce

PLAIN = GPTConfig(vocab_size=64, dim=32, n_layers=3, n_heads=2, n_kv_heads=1, ffn_dim=48, seq_len=32, tied=False)
MAPS = [(2, "static"), (4, "static"), (2, "dynamic"), (4, "dynamic")]


def config(streams, maps, **changes):
    return dataclasses.replace(PLAIN, streams=streams, stream_maps=maps, **changes)


def randomise(gpt, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if "hyper" in name:
                scale = 0.3 if name.endswith("phi") else 1.5
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
            elif parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    return gpt


def brute_force(hyper, streams, sublayer):
    """The formulas of the module's docstring, stream by stream and position by position. streams: list of (B, T, d)."""
    n = len(streams)
    shape = streams[0].shape
    read, written = torch.empty(shape, dtype=torch.float64), [torch.empty_like(s) for s in streams]
    mixing = torch.empty(*shape[:2], n, n, dtype=torch.float64)
    post = torch.empty(*shape[:2], n, dtype=torch.float64)
    for b in range(shape[0]):
        for t in range(shape[1]):
            logits = torch.cat([hyper.res, hyper.pre, hyper.post]).double()
            if hyper.phi is not None:
                flat = torch.cat([s[b, t] for s in streams])
                flat = flat / (flat.square().mean() + 1e-6).sqrt()
                gate = hyper.gate.double().repeat_interleave(torch.tensor([len(hyper.res), n, n]))
                logits = logits + gate * (hyper.phi.double() @ flat)
            orders = len(hyper.res)
            weights = logits[:orders].softmax(0)
            h = torch.zeros(n, n, dtype=torch.float64)
            for weight, order in zip(weights, permutations(range(n)), strict=True):
                for row, column in enumerate(order):
                    h[row, column] += weight
            mixing[b, t] = h
            pre = logits[orders : orders + n].sigmoid()
            post[b, t] = 2 * logits[orders + n :].sigmoid()
            read[b, t] = sum(pre[s] * streams[s][b, t] for s in range(n))
    y = sublayer(read)
    for s in range(n):
        written[s] = sum(mixing[..., s, r, None] * streams[r] for r in range(n)) + post[..., s, None] * y
    return written


@torch.no_grad()
@pytest.mark.parametrize(("streams", "maps"), MAPS)
def test_the_network_is_the_formulas(streams, maps):
    gpt = randomise(GPT(config(streams, maps, ternary=False), seed=0)).double()
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    cos, sin = gpt.cos[:9], gpt.sin[:9]
    state = [gpt.embed(tokens)] * streams
    for block in gpt.blocks:
        state = brute_force(block.hyper_attention, state, lambda u, block=block: block.attention(u, cos, sin))
        state = brute_force(block.hyper_feedforward, state, block.feedforward)
    expected = gpt.norm(sum(state) / streams)
    torch.testing.assert_close(gpt.hidden(tokens), expected, atol=1e-6, rtol=0)
    # the streams persist across blocks: they are not the mean of themselves
    assert (state[0] - state[1]).abs().max() > 0.1


@pytest.mark.parametrize("streams", [2, 4])
@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0, 60.0])
def test_mixing_is_doubly_stochastic_and_products_stay_so(streams, scale):
    torch.manual_seed(0)
    product = torch.eye(streams)
    for index in range(64):
        hyper = HyperConnection(streams, 8, index)
        torch.nn.init.normal_(hyper.res, std=scale)
        mixing = hyper.maps(torch.zeros(streams, 1, 1, 8))[2].detach()
        assert mixing.min() >= 0
        for axis in (0, 1):
            torch.testing.assert_close(mixing.sum(axis), torch.ones(streams), atol=1e-6, rtol=0)
        product = mixing @ product
    for axis in (0, 1):
        torch.testing.assert_close(product.sum(axis), torch.ones(streams), atol=1e-5, rtol=0)


def test_permutations_are_in_lexicographic_order():
    table = permutation_table(4).unflatten(1, (4, 4))
    assert table.shape[0] == 24
    assert torch.equal(table[0], torch.eye(4))
    assert torch.equal(table[-1], torch.eye(4).flip(0))
    assert table[1].argmax(-1).tolist() == [0, 1, 3, 2]
    assert len({tuple(p.argmax(-1).tolist()) for p in table}) == 24


@torch.no_grad()
@pytest.mark.parametrize(("streams", "maps"), MAPS)
def test_at_the_start_it_is_the_plain_residual(streams, maps):
    """Exactly while the output projections are zero; and every other weight is drawn as without streams."""
    tokens = torch.randint(0, 64, (2, 20))
    plain, ours = GPT(PLAIN, seed=3), GPT(config(streams, maps), seed=3)
    torch.testing.assert_close(ours.hidden(tokens), plain.hidden(tokens), atol=1e-5, rtol=0)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name))
    read = []
    for hyper in ours.modules():
        if isinstance(hyper, HyperConnection):
            pre, post, _ = hyper.maps(torch.randn(streams, 1, 1, 32))
            torch.testing.assert_close(pre.sum(-1).squeeze(), torch.tensor(1.0))
            torch.testing.assert_close(post.mean(-1).squeeze(), torch.tensor(1.0))
            read.append(int(pre.argmax(-1)))
            assert post.argmax(-1) == pre.argmax(-1)
    assert read == [index % streams for index in range(2 * PLAIN.n_layers)]
    # with random output projections the sub-layers read slightly different mixtures
    plain = GPT(dataclasses.replace(PLAIN, zero_init=False), seed=3)
    ours = GPT(config(streams, maps, zero_init=False), seed=3)
    assert F.cosine_similarity(plain.hidden(tokens), ours.hidden(tokens), dim=-1).mean() > 0.95


@pytest.mark.parametrize(("streams", "maps"), MAPS)
def test_every_parameter_gets_a_gradient_and_the_streams_part(streams, maps):
    gpt = GPT(config(streams, maps), seed=0)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    tokens = torch.randint(0, 64, (4, 33), generator=torch.Generator().manual_seed(0))
    seen = set()
    for _ in range(4):
        loss = F.cross_entropy(gpt(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in gpt.named_parameters():
            if "hyper" not in name:
                continue
            # where all streams must still be equal (before the first sub-layer) their mixing has no effect
            first = "blocks.0.hyper_attention" in name and name.endswith(("res", "pre", "phi", "gate"))
            if first or (parameter.grad != 0).float().mean() > 0.99:
                seen.add(name)
        optimizer.step()
    assert seen == {name for name, _ in gpt.named_parameters() if "hyper" in name}
    with torch.no_grad():
        x = expand(gpt.embed(tokens[:, 1:]), streams)
        for block in gpt.blocks:
            x = block(x, gpt.cos, gpt.sin)
        spread = (x - reduce(x)).norm() / x.norm()
    assert spread > 0.01


@torch.no_grad()
@pytest.mark.parametrize(("streams", "maps"), MAPS)
def test_decoding_with_a_cache(streams, maps):
    gpt = inference_copy(randomise(GPT(config(streams, maps), seed=0)).double())
    tokens = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    decoder = Decoder(gpt, batch=2)
    pieces = [decoder.hidden(piece) for piece in tokens.split([9, 1, 1, 9], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), gpt.hidden(tokens), atol=1e-6, rtol=0)


def test_in_bf16_autocast_the_streams_stay_in_float32():
    gpt = randomise(GPT(config(4, "dynamic"), seed=0))
    with torch.autocast("cpu", torch.bfloat16):
        x = expand(gpt.embed(torch.arange(8)[None]), 4)
        for block in gpt.blocks:
            x = block(x, gpt.cos[:8], gpt.sin[:8])
    assert x.dtype == torch.float32
    x.sum().backward()


@pytest.mark.parametrize(("values", "message"), [((3, "static"), "model.streams=3"), ((2, "learned"), "mhc.maps")])
def test_values_that_it_does_not_have(values, message):
    with pytest.raises(ConfigError, match=message):
        config(*values)
