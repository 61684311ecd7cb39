"""Weights in bfloat16, in whole runs: what is computed, saved, resumed and shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.checkpoint import load_run
from nanochat.config.compose import compose
from nanochat.config.vocabulary import plan_vocabulary
from nanochat.errors import UserError
from nanochat.model.bitlinear import BitLinear
from nanochat.objectives import Step
from nanochat.run import settle, train
from nanochat.training.module import NanoChatModule
from tests.runs import TINY, configure, read_metrics, read_state, same

BARE = ["~callbacks.ternary_health", "~callbacks.loss_plot", "~callbacks.sampler", "schedule=constant",
        "schedule.warmup_steps=0", "callbacks.checkpoint.every_n_train_steps=2"]  # fmt: skip


def module_of(*overrides: str) -> NanoChatModule:
    words = [word for word in TINY if not word.startswith(("data", "model.vocab_size"))]
    cfg: Any = plan_vocabulary(settle(compose([*words, "data=synthetic", "model.vocab_size=300", *overrides])))
    return NanoChatModule(cfg)


def loss_of(module: NanoChatModule) -> torch.Tensor:
    tokens = torch.randint(300, (4, 33), generator=torch.Generator().manual_seed(0)) % 50
    step = Step.of(module.gpt, tokens[:, :-1], tokens[:, 1:])
    return torch.stack([objective(step) for objective in module.objectives.values()]).sum()


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.tied=false"],
        ["model.tied=false", "model.ternary=false"],
        ["model.tied=false", "model.weight_block=row", "model.int8=true"],
        ["model.tied=false", "model.value_embeddings=2"],
    ],
    ids=" ".join,
)
def test_gradients_are_those_of_float32_rounded(overrides: list[str]) -> None:
    small, wide = module_of("weights=bfloat16", *overrides), module_of(*overrides)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16, torch.float32}
    assert all((p.dtype == torch.float32) == (p.ndim == 1) for p in small.parameters())
    wide.load_state_dict(small.state_dict())
    assert torch.equal(loss_of(small), loss_of(wide))
    for module in (small, wide):
        loss_of(module).backward()
    for (name, p), q in zip(small.named_parameters(), wide.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad.to(p.dtype)), name


def test_a_table_of_both_ends_adds_two_roundings() -> None:
    small, wide = module_of("weights=bfloat16", "+mtp=on"), module_of("+mtp=on")
    wide.load_state_dict(small.state_dict())
    for module in (small, wide):
        loss_of(module).backward()
    for (name, p), q in zip(small.named_parameters(), wide.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert (p.grad - q.grad).norm() <= 2.0**-8 * q.grad.norm(), name


def test_a_run_resumes_to_the_last_bit_and_ships_what_it_trained(tmp_path: Path) -> None:
    settings = [*BARE, "weights=bfloat16", "optim=muon8bit", "trainer.max_steps=4", "trainer.val_check_interval=4"]
    train(configure(tmp_path, settings), tmp_path / "whole")
    train(configure(tmp_path, [*settings, f"ckpt_path='{tmp_path}/whole/checkpoints/step=2.ckpt'"]), tmp_path / "again")
    state = read_state(tmp_path / "whole")
    same(state, read_state(tmp_path / "again"))
    kinds = {name: value.dtype for name, value in state["state_dict"].items()}
    assert kinds["gpt.embedding.weight"] == kinds["gpt.blocks.0.attention.q.weight"] == torch.bfloat16
    assert kinds["gpt.norm.weight"] == torch.float32
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "whole") if row["train/loss"]]
    assert float(losses[-1]) < float(losses[0])

    run = load_run(tmp_path / "whole")
    assert run.gpt.embedding.weight.dtype == torch.float32
    trained = NanoChatModule(
        torch.load(tmp_path / "whole/checkpoints/last.ckpt", weights_only=True)["hyper_parameters"]["cfg"]
    )
    trained.load_state_dict(state["state_dict"])
    pairs = [
        (a, b)
        for a, b in zip(trained.gpt.modules(), run.gpt.modules(), strict=True)
        if isinstance(a, BitLinear) and isinstance(b, BitLinear)
    ]
    assert len(pairs) == 14
    for a, b in pairs:
        same(a.quantised(), b.quantised())
        assert torch.equal(a.shipped_weight(torch.float32), b.shipped_weight())

    last = f"ckpt_path='{tmp_path}/whole/checkpoints/last.ckpt'"
    with pytest.raises(UserError, match="weights bfloat16 -> float32"):
        train(configure(tmp_path, [*settings, "weights=float32", last]), tmp_path / "other")
