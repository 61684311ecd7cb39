"""The health of ternary weights against a count by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer

from nanochat.errors import UserError
from nanochat.model import GPT, GPTConfig
from nanochat.model.bitlinear import BitLinear
from nanochat.run import train
from nanochat.training.callbacks import ternary_health
from nanochat.training.callbacks.base import StepCallback
from nanochat.training.callbacks.ternary_health import TernaryHealth
from tests.optim.test_host_sync import host_reads
from tests.runs import configure, read_metrics
from tests.training.callbacks.short_runs import BARE


class Witness(StepCallback):
    """Keeps the weights that the forward pass would multiply by, after each step."""

    seen: list[dict[int, list[torch.Tensor]]] = []  # noqa: RUF012

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.on_step_end(trainer, pl_module, trainer.global_step)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        layers = {}
        for i, block in enumerate(pl_module.gpt.blocks):  # type: ignore[union-attr, arg-type]
            linears = [m for m in block.modules() if isinstance(m, BitLinear)]
            layers[i] = [linear.shipped_weight().detach().clone() for linear in linears]
        self.seen.append(layers)


def by_hand(now: list[torch.Tensor], before: list[torch.Tensor], steps: int) -> tuple[float, float, float]:
    """Zeros, flips per step and the mean scale, entry by entry; a row of 64 or 128 weights has one scale."""
    zeros = flips = count = 0
    scales = 0.0
    for new, old in zip(now, before, strict=True):
        for row, row_before in zip(new.tolist(), old.tolist(), strict=True):
            for value, earlier in zip(row, row_before, strict=True):
                zeros += value == 0
                flips += (value > 0) - (value < 0) != (earlier > 0) - (earlier < 0)
            scales += max(map(abs, row)) * len(row)
            count += len(row)
    return zeros / count, flips / count / steps, scales / count


def test_zeros_flips_and_scales_are_those_of_a_count(place: Path) -> None:
    Witness.seen = []
    settings = [*BARE, "trainer.max_steps=5", "callbacks.ternary_health.every_n_steps=2", "optim.lr=0.05",
                f"+callbacks.witness._target_={__name__}.Witness", "loss.label_smoothing=0.1"]  # fmt: skip
    train(configure(place, settings), place / "health")
    rows = {int(row["step"]): row for row in read_metrics(place / "health") if row["train/loss"]}
    assert [step for step, row in rows.items() if row["ternary/zeros"]] == [2, 4]
    names = ("ternary/zeros", "ternary/flips", "ternary/scale")
    for step in (2, 4):
        now, before = Witness.seen[step], Witness.seen[step - 2]
        for layer in (0, 1):
            expected = by_hand(now[layer], before[layer], 2)
            assert [float(rows[step][f"{name}_{layer}"]) for name in names] == pytest.approx(expected, rel=1e-5)
        flat = [[tensor for tensors in side.values() for tensor in tensors] for side in (now, before)]
        assert [float(rows[step][name]) for name in names] == pytest.approx(by_hand(*flat, 2), rel=1e-5)
        assert float(rows[step]["ternary/flips"]) > 0


def test_a_resumed_run_says_the_same(place: Path) -> None:
    settings = [*BARE, "callbacks.ternary_health.every_n_steps=3", "callbacks.checkpoint.every_n_train_steps=4"]
    train(configure(place, [*settings, "trainer.max_steps=6"]), place / "straight")
    train(configure(place, [*settings, "trainer.max_steps=6", "trainer.max_time=0.001s"]), place / "halves")
    train(configure(place, [*settings, "trainer.max_steps=6", "ckpt_path=last"]), place / "halves")
    straight, halves = (read_metrics(place / name) for name in ("straight", "halves"))
    assert straight == halves
    assert sum(bool(row["ternary/flips"]) for row in straight) == 2


def test_looks_meet_the_rows_of_metrics(place: Path) -> None:
    settings = [*BARE, "callbacks.ternary_health.every_n_steps=3", "callbacks.metrics.every_n_steps=2"]
    train(configure(place, settings), place / "rare looks")
    rows = [row for row in read_metrics(place / "rare looks") if row["train/loss"]]
    assert [(row["step"], bool(row["ternary/zeros"])) for row in rows] == [("2", False), ("4", True)]


class Module(torch.nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gpt = GPT(config, seed=0)


@pytest.mark.parametrize("block", [256, "row", 0])
def test_some_rows_stand_for_all_and_are_read_once(block: int | str) -> None:
    config = GPTConfig(dim=256, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=512, vocab_size=64, weight_block=block,
                       zero_init=False)  # fmt: skip
    module, found = Module(config), []
    for weights in (2**30, 8192):
        health = TernaryHealth(weights=weights)
        health._look(module, 0)  # type: ignore[arg-type]
        with torch.no_grad():
            for linear in [m for m in module.modules() if isinstance(m, BitLinear)]:
                linear.weight.mul_(1.0)  # another version of the same values
        with host_reads() as reads:
            found.append(health._look(module, 10))  # type: ignore[arg-type]
        assert reads.found == ["tolist"]
    whole, part = found
    assert whole["ternary/flips"] == part["ternary/flips"] == 0
    assert part["ternary/zeros"] == pytest.approx(whole["ternary/zeros"], abs=4 / math.sqrt(14 * 8192))
    assert part["ternary/scale"] == pytest.approx(whole["ternary/scale"], rel=0.05)
    assert max(trits.numel() for trits in health._trits.values()) == 8192


def test_a_float_model_has_no_ternary_health() -> None:
    module = Module(GPTConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=64, vocab_size=64, ternary=False))
    assert list(ternary_health.matrices(module)) == []  # type: ignore[arg-type]
    health = TernaryHealth()
    assert health._look(module, 0) == health._look(module, 1) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"weights": 0}])
def test_what_makes_no_sense(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="must be at least 1"):
        TernaryHealth(**options)
