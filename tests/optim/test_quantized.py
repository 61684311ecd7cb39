"""8-bit codes and the rules that keep their state in them."""

import pytest
import torch
from torch import nn

from nanochat.errors import UserError
from nanochat.optim import build
from nanochat.optim.quantized import BLOCK, SMALL, SPAN, dequantize, encode, quantize, rounding_generator
from tests.optim.helpers import Net, make, only, single, train


def definition(x, block, code):
    """Every code's value against every element, in float64: the nearest wins."""
    c = torch.arange(-127, 128, dtype=torch.float64)
    if code == "linear":
        values = c / 127
    elif code == "square":
        values = c.sign() * (c / 127) ** 2
    else:
        values = ((c + 128) / 255) ** 4
    result = torch.empty_like(x, dtype=torch.float64)
    for start in range(0, len(x), block):
        part = x[start : start + block].double()
        largest = part.abs().max()
        grid = values * largest
        # nearest in the domain that is rounded: the square's and the quartic's roots
        root = {"linear": 1.0, "square": 0.5, "quartic": 0.25}[code]
        warp = lambda t, root=root: t.sign() * t.abs() ** root  # noqa: E731
        nearest = (warp(part)[:, None] - warp(grid)[None]).abs().argmin(1)
        result[start : start + block] = grid[nearest]
    return result


@pytest.mark.parametrize("code", ["linear", "square", "quartic"])
@pytest.mark.parametrize(("numel", "block"), [(100, 64), (4096, 256), (5000, 2048), (3, 2048)])
def test_codes_are_the_nearest(code, numel, block):
    torch.manual_seed(0)
    x = torch.randn(numel) * torch.rand(numel) ** 3
    x = x.square() if code == "quartic" else x
    codes, absmax = quantize(x, block, code)
    assert codes.dtype == torch.int8
    assert absmax.dtype == torch.float32
    assert absmax.numel() == -(-numel // block)
    found = dequantize(codes, absmax, block, code).double()
    expected = definition(x, block, code)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-12)


def test_spans_do_not_show():
    """A tensor longer than a span, with a partial last block, is coded block by block."""
    x = torch.randn(2 * SPAN + 3 * BLOCK + 17)
    codes, absmax = quantize(x)
    for start in (0, SPAN, 2 * SPAN + 3 * BLOCK):
        part = x[start : start + BLOCK]
        assert absmax[start // BLOCK] == part.abs().max()
        assert torch.equal(codes[start : start + BLOCK], torch.round(part * (127 / part.abs().max())).to(torch.int8))


@pytest.mark.parametrize("code", ["linear", "square", "quartic"])
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-30, 1e30])
def test_extreme_blocks(code, size):
    x = torch.full((BLOCK,), size)
    x[1] = 0.0
    back = dequantize(*quantize(x, code=code), code=code)
    assert ((back - x).abs() <= size).all()
    if size >= 1e-30:
        torch.testing.assert_close(back[0], x[0])


def test_a_positive_second_moment_never_becomes_zero():
    x = torch.full((BLOCK,), 1e-20)
    x[0] = 1.0
    assert (dequantize(*quantize(x, code="quartic"), code="quartic") > 0).all()


def test_stochastic_rounding_is_unbiased_and_a_function_of_the_step():
    x = torch.full((BLOCK,), 0.3)
    x[0] = 127.0
    codes, absmax = torch.empty(BLOCK, dtype=torch.int8), torch.empty(1)
    total = torch.zeros(BLOCK)
    for step in range(40):
        encode(x, codes, absmax, "linear", rounding_generator(step, 3, torch.device("cpu")))
        total += dequantize(codes, absmax)
    assert set(codes[1:].tolist()) == {0, 1}
    assert abs(total[1:].mean() / 40 - 0.3) < 0.01
    again = codes.clone()
    encode(x, again, absmax, "linear", rounding_generator(39, 3, torch.device("cpu")))
    assert torch.equal(codes, again)


def test_a_stochastic_code_never_wraps(monkeypatch):
    """The largest random number below 1 rounds the largest value up."""
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, 1.0 - 2.0**-24))
    x = torch.full((BLOCK,), 0.7)
    for code in ("linear", "square", "quartic"):
        codes, absmax = torch.empty(BLOCK, dtype=torch.int8), torch.empty(1)
        encode(x, codes, absmax, code, torch.Generator())
        assert (codes == 127).all()


@pytest.mark.parametrize(("rule", "plain"), [("adamw8bit", "adamw"), ("lion8bit", "lion"), ("muon8bit", "muon")])
@pytest.mark.parametrize("stochastic", [False, True])
def test_follows_its_32_bit_rule(rule, plain, stochastic):
    """40 steps down a noisy bowl: the ways stay close (the 8-bit state is only noise on the direction)."""

    def run(name, **options):
        torch.manual_seed(4)
        start, target = torch.randn(96, 128), torch.randn(96, 128)
        optimizer = single(start.clone(), name, 0.01, weight_decay=0.01, **options)
        for _ in range(40):
            only(optimizer).grad = (only(optimizer).detach() - target) + 0.1 * torch.randn(96, 128)
            optimizer.step()
        return start, only(optimizer).detach(), optimizer

    start, exact, _ = run(plain)
    _, found, optimizer = run(rule, stochastic_rounding=stochastic)
    state = optimizer.state[only(optimizer)]
    assert sum(value.dtype == torch.int8 for value in state.values() if isinstance(value, torch.Tensor)) >= 1
    cosine = torch.cosine_similarity((exact - start).flatten(), (found - start).flatten(), dim=0)
    assert cosine > 0.99
    assert (found - exact).norm() < 0.12 * (exact - start).norm()


@pytest.mark.parametrize(
    ("rule", "forgetful", "key"),
    [
        ("muon8bit", {"momentum": 0.0}, "momentum"),
        ("lion8bit", {"betas": (0.9, 0.0)}, "momentum"),
        ("adamw8bit", {"betas": (0.0, 0.0)}, "exp_avg"),
    ],
)
def test_rules_round_stochastically_when_asked_to(rule, forgetful, key):
    """Codes of two steps and two parameters with one gradient; the momenta are then all the gradient itself."""
    gradient = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))

    def codes(stochastic):
        weights = [(name, nn.Parameter(torch.ones(64, 128))) for name in "ab"]
        group = {"rule": rule, "stochastic_rounding": stochastic, **forgetful}
        optimizer = build(weights, lr=0.01, groups={"all": group})
        found = []
        for _ in range(2):
            for _, parameter in weights:
                parameter.grad = gradient.clone()
            optimizer.step()
            found += [optimizer.state[parameter][key].clone() for _, parameter in weights]
        return found

    nearest, rounded = codes(False), codes(True)
    assert all(torch.equal(nearest[0], other) for other in nearest[1:])
    draws = [nearest[0], *rounded]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert 0.05 < (one != other).float().mean() < 0.95
            assert (one.int() - other.int()).abs().max() <= 1
    assert all(torch.equal(one, other) for one, other in zip(rounded, codes(True), strict=True))


def test_bytes_of_the_matrices():
    """The claims, from tensors: 8-bit Muon at most 1.01 bytes an element, NorMuon included, 8-bit AdamW 2.004."""
    for rule, most, options in (
        ("muon8bit", 1.01, {}),
        ("muon8bit", 1.01, {"normuon_beta": 0.9}),
        ("adamw8bit", 2.01, {}),
        ("lion8bit", 1.01, {}),
    ):
        optimizer = single(torch.zeros(256, 512), rule, 0.1, **options)
        only(optimizer).grad = torch.ones(256, 512)
        optimizer.step()
        assert most - 0.01 < optimizer.state_bytes() / (256 * 512) <= most


def test_muon8bit_on_a_tiny_like_model():
    """The hybrid's whole state against AdamW's, in the proportions of model=tiny with a tied table."""

    def size(name):
        net = Net(vocab=1024, dim=64, wide=128, layers=4, tied=True)
        optimizer = make(name, net)
        net.embedding.weight.grad = torch.ones_like(net.embedding.weight)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        return optimizer.state_bytes()

    assert size("muon8bit") <= 0.30 * size("adamw")


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit", "muon8bit"])
def test_small_tensors_and_norms_stay_in_32_bits(name):
    net = Net(dim=128, wide=256)
    optimizer = make(name, net)
    train(net, optimizer, 0, 1)
    for parameter, state in optimizer.state.items():
        codes = [v for v in state.values() if isinstance(v, torch.Tensor) and v.dtype == torch.int8]
        assert bool(codes) == (parameter.numel() >= SMALL)


@pytest.mark.parametrize("rule", ["adamw8bit", "lion8bit", "muon8bit", "galore8bit", "galore-muon8bit"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_spoiled_gradient_never_enters_a_quantised_state(rule, bad):
    """Without any guard: the whole step is dropped, other groups' parameters too."""
    weights = [("w", nn.Parameter(torch.randn(64, 128))), ("b", nn.Parameter(torch.randn(8)))]
    groups = {"w": {"match": "w", "rule": rule}, "b": {"rule": "adamw"}}
    optimizer = build(weights, lr=0.01, groups=groups)
    for gradient in (1.0, bad):
        for _, p in weights:
            p.grad = torch.full_like(p, 1.0)
        weights[0][1].grad[3, 4] = gradient
        before = [p.detach().clone() for _, p in weights]
        optimizer.step()
    assert all(torch.equal(p, b) for (_, p), b in zip(weights, before, strict=True))
    assert optimizer.skipped_steps == 1
    for state in optimizer.state.values():
        assert all(torch.isfinite(v.float()).all() for v in state.values() if isinstance(v, torch.Tensor))


def test_another_block_size_is_refused():
    net = Net(dim=128)
    optimizer = make("muon8bit", net)
    train(net, optimizer, 0, 1)
    with pytest.raises(UserError, match=r"block_size=2048.*block_size=256"):
        make("muon8bit", net, block_size=256).load_state_dict(optimizer.state_dict())


def test_embedding_state_switch():
    for name in ("muon8bit", "galore8bit", "galore-muon8bit", "adamw8bit"):
        rules = {g["name"]: g["rule"] for g in make(name, Net(), embedding_state="fp32").param_groups}
        assert rules["embedding"] == rules["head"] == "adamw"
        assert rules["matrices"] == name
        rules = {g["name"]: g["rule"] for g in make(name, Net()).param_groups}
        assert rules["embedding"] == rules["head"] == "adamw8bit"
    assert make("lion8bit", Net(), embedding_state="fp32").param_groups[0]["rule"] == "lion"
    assert make("muon", Net(), embedding_state="8bit").param_groups[0]["rule"] == "adamw8bit"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("muon8bit", {"block_size": 0}, r"optim\.block_size=0"),
        ("muon8bit", {"block_size": 2**63}, "from 16 to 16,777,216"),
        ("adamw8bit", {"kernels": "triton"}, "kernels='triton' is unknown; choose one of auto, tensor, bitsandbytes"),
    ],
)
def test_bad_options(name, changes, message):
    with pytest.raises(UserError, match=message):
        make(name, Net(), **changes)


def test_ties_to_bitsandbytes():
    """Blockwise linear codes: dequantised values within one code of bitsandbytes' own."""
    from bitsandbytes import functional

    torch.manual_seed(0)
    x = torch.randn(64, BLOCK)
    theirs = functional.dequantize_blockwise(
        *functional.quantize_blockwise(x, code=functional.create_linear_map(signed=True), blocksize=BLOCK)
    )
    codes, absmax = quantize(x)
    assert ((dequantize(codes, absmax) - theirs).abs() <= absmax[:, None] / 127 * 1.01).all()


@pytest.mark.parametrize(("rule", "plain"), [("adamw8bit", "adamw"), ("lion8bit", "lion")])
def test_bitsandbytes_kernels_follow_the_32_bit_rule(rule, plain):
    def run(name, **options):
        torch.manual_seed(4)
        start, target = torch.randn(96, 128), torch.randn(96, 128)
        optimizer = single(start.clone(), name, 0.01, weight_decay=0.01, **options)
        for _ in range(20):
            only(optimizer).grad = (only(optimizer).detach() - target) + 0.1 * torch.randn(96, 128)
            optimizer.step()
        return start, only(optimizer).detach(), optimizer

    start, exact, _ = run(plain)
    _, found, optimizer = run(rule, kernels="bitsandbytes")
    assert (found - exact).norm() < 0.12 * (exact - start).norm()
    assert optimizer.state[only(optimizer)]["state1"].dtype == torch.uint8
    again = single(found.clone(), rule, 0.01, kernels="bitsandbytes")
    again.load_state_dict(optimizer.state_dict())
    with pytest.raises(UserError, match="kernels=bitsandbytes"):
        single(found.clone(), rule, 0.01, kernels="tensor").load_state_dict(optimizer.state_dict())


def test_missing_bitsandbytes_is_named(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="bitsandbytes is not installed"):
        single(torch.zeros(64, 64), "adamw8bit", 0.1, kernels="bitsandbytes")
