"""The integer forward pass: exact against float64, the float path's gradients, and the same through the tape."""

from dataclasses import replace

import pytest
import torch

from nanochat.errors import ConfigError
from nanochat.inference.engine import inference_copy
from nanochat.model import GPTConfig, int8
from nanochat.model.bitlinear import BitLinear, project, ternarise
from nanochat.objectives import NextToken, Step, linear_cross_entropy
from nanochat.objectives.mtp import MultiTokenPrediction
from tests.model.test_compact_backward import BASE, check_against_the_oracle, data, network

ROW = replace(BASE, weight_block="row", int8=True)
FORMS = [
    {},
    {"weight_block": 0},
    {"weight_block": 64},  # covers every row
    {"n_kv_heads": 1, "sub_norm": True, "tied": False, "head_std": 0.3},
    {"streams": 2},
    {"value_embeddings": 2},
]


@pytest.fixture(params=[True, False], ids=["int8 kernel", "float32 kernel"])
def kernel(request, monkeypatch):
    """Both ways to multiply integers, whatever this machine has."""
    monkeypatch.setattr(int8, "_has_units", lambda _: request.param)
    return request.param


def some_linears(block="row", sizes=((96, 24), (96, 40))) -> list[BitLinear]:
    source = torch.Generator().manual_seed(0)
    linears = [
        BitLinear(i, o, GPTConfig(weight_block=block, dim=96, n_heads=4, ffn_dim=96, int8=True)) for i, o in sizes
    ]
    for linear in linears:
        torch.nn.init.normal_(linear.weight, generator=source)
    return linears


@pytest.mark.parametrize("block", ["row", 0])
def test_the_forward_is_exact(block, kernel):
    """Against the float64 product of the de-quantised operands: only the two scales round."""
    linears = some_linears(block)
    assert all(linear.int8 for linear in linears)
    x = torch.randn(3, 11, 96, generator=torch.Generator().manual_seed(1))
    step = (x.abs().amax(-1, keepdim=True) / 127).double()
    codes = (x / (x.abs().amax(-1, keepdim=True) / 127)).round().double()
    for y, linear in zip(project(x, *linears), linears, strict=True):
        trits, scales = ternarise(linear.weight.detach(), block)
        expected = (codes @ trits.double().T) * step * scales.double().T
        torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=0.0)


def test_both_kernels_agree_to_the_last_bit():
    codes = torch.randint(-127, 128, (40, 2048), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    trits = torch.randint(-1, 2, (24, 2048), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    results = []
    for has in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(int8, "_has_units", lambda _, has=has: has)
            results.append(int8.integer_product(codes, trits))
    assert torch.equal(*results)
    assert torch.equal(results[0].long(), codes.long() @ trits.long().T)


def test_the_gradients_are_those_of_the_float_path(kernel):
    linears = some_linears()
    x = torch.randn(2, 9, 96, generator=torch.Generator().manual_seed(2), requires_grad=True)
    upstream = [torch.randn(2, 9, n, generator=torch.Generator().manual_seed(n)) for n in (24, 40)]
    found = {}
    for mode in (True, False):
        for linear in linears:
            linear.int8 = mode
        ys = project(x, *linears)
        loss = sum((y * u).sum() for y, u in zip(ys, upstream, strict=True))
        found[mode] = torch.autograd.grad(loss, [x, *(linear.weight for linear in linears)])
    for ours, theirs in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("switches", FORMS, ids=str)
def test_a_network_computes_what_its_float_form_does(switches, kernel):
    config = replace(ROW, **switches)
    gpt, plain = network(config).float(), network(replace(config, int8=False)).float()
    assert any(m.int8 for m in gpt.modules() if isinstance(m, BitLinear))
    tokens, targets = data(config)
    grads = {}
    for name, model in (("int8", gpt), ("plain", plain)):
        loss = linear_cross_entropy(model.hidden(tokens), model.head_weight(), targets).loss
        loss.backward()
        grads[name] = (loss, {n: p.grad for n, p in model.named_parameters()})
    assert grads["int8"][0].item() == pytest.approx(grads["plain"][0].item(), rel=1e-5)
    for name, g in grads["plain"][1].items():
        if g is not None and g.norm() > 1e-6:
            # a rounding of an activation may fall on the other side
            assert (grads["int8"][1][name] - g).norm() <= 0.02 * g.norm(), name


@pytest.mark.parametrize("switches", [{}, {"value_embeddings": 1}, {"n_kv_heads": 1, "sub_norm": True}], ids=str)
def test_the_compact_backward_follows_it(switches, kernel, monkeypatch):
    check_against_the_oracle(network(replace(ROW, **switches)), monkeypatch, count=14, tolerance=2e-5)


def test_with_multi_token_prediction(kernel):
    gpt, objectives = network(ROW), [NextToken(ROW), MultiTokenPrediction(ROW, token_fraction=1.0)]
    tokens, targets = data(ROW)
    step = Step.of(gpt, tokens, targets)
    torch.stack([objective(step) for objective in objectives]).sum().backward()
    head = objectives[1].heads[0]
    assert head.eh_proj.int8
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in (*gpt.parameters(), *head.parameters()))


def test_under_autocast(kernel):
    gpt = network(ROW)
    tokens, targets = data(ROW)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(gpt.hidden(tokens), gpt.head_weight(), targets).loss
    loss.backward()
    exact = linear_cross_entropy(gpt.hidden(tokens), gpt.head_weight(), targets).loss
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(torch.isfinite(p.grad).all() for p in gpt.parameters() if p.grad is not None)


def test_inference_multiplies_the_same_weights():
    gpt = network(ROW)
    copy = inference_copy(gpt)
    tokens, _ = data(ROW)
    assert not copy.config.int8
    torch.testing.assert_close(copy.hidden(tokens), gpt.hidden(tokens).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("switches", "sentence"),
    [
        ({"int8": "yes"}, r"model\.int8='yes' must be auto, true or false"),
        ({"ternary": False}, r"model\.int8=true needs ternary weights"),
        ({"activation_scale": "block"}, r"model\.int8=true needs model\.activation_scale=token, not block"),
        (
            {"weight_block": 16},
            r"model\.int8=true needs scales that are constant along a row.*use model\.weight_block=row",
        ),
        ({"weight_block": "rows", "int8": False}, r"model\.weight_block='rows' must be positive, `row`, or 0"),
        ({"scale_format": "float8"}, r"model\.scale_format='float8' is unknown"),
    ],
    ids=str,
)
def test_mistakes(switches, sentence):
    with pytest.raises(ConfigError, match=sentence):
        replace(ROW, **switches)


def test_auto_is_settled_by_the_machine(monkeypatch):
    from nanochat.config.compose import compose
    from nanochat.run import settle

    words = ["model=tiny", "model.weight_block=row", "tokenizer=byte", "data=synthetic", "trainer=cpu"]
    for units in (True, False):
        monkeypatch.setattr("nanochat.run.has_int8_products", lambda _, units=units: units)
        assert settle(compose(words))["model"]["int8"] is units
        assert settle(compose([*words, "model.weight_block=256"]))["model"]["int8"] is False  # ffn_dim is 512
