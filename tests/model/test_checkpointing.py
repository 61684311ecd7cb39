"""Activation checkpointing changes no bit of a loss or a gradient, and does drop what it says it drops."""

import pytest
import torch

from nanochat.config.rules import CHECKPOINTING
from nanochat.model import GPT, GPTConfig
from nanochat.model.checkpointing import MODES, set_checkpointing
from nanochat.model.compact_backward import KeptRows
from nanochat.objectives import NextToken, Step
from nanochat.objectives.mtp import MultiTokenPrediction
from nanochat.objectives.token_filter import TopTokens

SMALL = {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 48, "seq_len": 24,
         "zero_init": False, "weight_block": 16}  # fmt: skip
VARIANTS = {
    "plain": {},
    "float": {"ternary": False},
    "int8": {"weight_block": "row", "int8": True},
    "int8 backward": {"weight_block": "row", "int8": True, "int8_backward": True},
    "streams": {"streams": 2},
    "dynamic streams": {"streams": 2, "stream_maps": "dynamic"},
    "value embeddings": {"value_embeddings": 2},
    "value gate": {"value_embeddings": 1, "value_gate": "input"},
    "sub norm": {"sub_norm": True, "activation": "relu2"},
}


def step(config, mode, filtered=False, bf16=False, compiled=False):
    """The loss, all gradients, and the bytes that autograd keeps between forward and backward."""
    gpt = GPT(config, seed=0)
    objectives = [NextToken(config), MultiTokenPrediction(config, seed=1, tokens=2, token_fraction=0.5)]
    modules = torch.nn.ModuleList([gpt, *objectives])
    set_checkpointing(modules, mode)
    if compiled:
        for block in gpt.blocks:
            block.compile(backend="eager")
    if filtered:
        gpt.kept_rows, objectives[0].selector = KeptRows(), TopTokens(14)
    tokens = torch.randint(61, (4, 25), generator=torch.Generator().manual_seed(0))
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            batch = Step.of(gpt, tokens[:, :-1], tokens[:, 1:])
            loss = sum(objective(batch) for objective in objectives)
        size = sum(saved.values())
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in modules.named_parameters()}, size


CASES = [(variant, filtered, False) for variant in VARIANTS for filtered in (False, True)]
CASES += [(variant, True, True) for variant in ("plain", "int8")] + [("streams", False, True)]


@pytest.mark.parametrize(("variant", "filtered", "bf16"), CASES)
def test_losses_and_gradients_are_equal_to_the_last_bit(variant, filtered, bf16):
    config = GPTConfig(**{**SMALL, **VARIANTS[variant]})
    expected_loss, expected, whole = step(config, "none", filtered, bf16)
    kept = []
    for mode in MODES[1:]:
        loss, got, size = step(config, mode, filtered, bf16)
        assert torch.equal(loss, expected_loss)
        for name, gradient in expected.items():
            assert torch.equal(got[name], gradient), (mode, name)
        kept.append(size)
    assert whole > kept[0] > kept[2]  # feedforward, block
    assert whole > kept[1] > kept[2]  # every_other, block


def test_compiled_blocks():
    torch._dynamo.reset()
    config = GPTConfig(**{**SMALL, "n_layers": 1, "ternary": False})
    expected_loss, expected, whole = step(config, "none", compiled=True)
    torch._dynamo.reset()
    loss, got, size = step(config, "feedforward", compiled=True)  # whole blocks are recomputed from outside
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())
    assert size < whole


def test_what_autograd_keeps_does_not_grow_with_the_width_of_the_feed_forward():
    sizes = [step(GPTConfig(**{**SMALL, "ffn_dim": width}), "block")[2] for width in (48, 96)]
    plain = [step(GPTConfig(**{**SMALL, "ffn_dim": width}), "none")[2] for width in (48, 96)]
    assert sizes[0] == sizes[1]
    assert plain[1] > plain[0]


def test_no_gradients_no_recomputation():
    gpt = GPT(GPTConfig(**SMALL), seed=0)
    set_checkpointing(gpt, "block")
    with torch.no_grad():
        assert not gpt.hidden(torch.zeros(1, 4, dtype=torch.int64)).requires_grad


def test_the_check_of_a_configuration_knows_all_modes():
    """It has them written out, since it imports no torch."""
    assert CHECKPOINTING == MODES
