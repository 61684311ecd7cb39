"""Whether the ternary weights are alive: how many are zero, how many change, and how large they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from nanochat import ranks
from nanochat.errors import UserError
from nanochat.model.bitlinear import BitLinear, ternarise
from nanochat.training.callbacks.base import StepCallback
from nanochat.training.callbacks.metrics import MetricsCSV


class TernaryHealth(StepCallback):
    """Adds to the module's `step_metrics`, every few steps, for the ternary matrices of all blocks and of each layer i:

    | metric | meaning |
    |---|---|
    | `ternary/zeros`, `ternary/zeros_i` | share of the weights that are 0 |
    | `ternary/flips`, `ternary/flips_i` | share that has another trit than at the last look, per step since then |
    | `ternary/scale`, `ternary/scale_i` | mean scale |

    Each is a mean over weights. One host sync a look, none on other steps. Place it before the metrics. What was seen
    last is part of the checkpoint, so that a resumed run says the same.

    Args:
        every_n_steps: optimizer steps between two looks; rounded up to the next multiple of the rows of metrics.csv.
        weights: of a matrix that are looked at, at most: whole rows, spread evenly. Larger matrices are estimated.
    """

    def __init__(self, every_n_steps: int = 100, weights: int = 65536) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("weights", weights)):
            if value < 1:
                raise UserError(f"callbacks.ternary_health.{name}={value} must be at least 1.")
        self.every_n_steps, self.weights = every_n_steps, weights
        self._interval = every_n_steps
        self._trits: dict[str, Tensor] = {}
        """of the last look, int8"""
        self._looked = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        rows = next((c.every_n_steps for c in trainer.callbacks if isinstance(c, MetricsCSV)), 1)  # type: ignore[attr-defined]
        # rank 0's, which alone writes the metrics: all look at the same steps
        self._interval = int(ranks.first(-(-self.every_n_steps // rows) * rows))
        if self._trits:
            self._trits = {name: trits.to(pl_module.device) for name, trits in self._trits.items()}
        else:
            self._look(pl_module, trainer.global_step)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if step % self._interval == 0:
            metrics: dict[str, float] = pl_module.step_metrics  # type: ignore[assignment]
            metrics |= self._look(pl_module, step)

    @torch.no_grad()
    def _look(self, module: LightningModule, step: int) -> dict[str, float]:
        """The metrics, where there was a look before; keeps the trits."""
        layers, sizes, shares = [], [], []
        before, steps = self._trits, step - self._looked
        self._trits, self._looked = {}, step
        for layer, name, linear in matrices(module):
            trits, scales = self._some_rows(linear)
            self._trits[name] = trits.to(torch.int8)
            if name in before and steps:
                flips = (self._trits[name] != before[name]).float().mean() / steps
                layers.append(layer)
                sizes.append(linear.weight.numel())
                shares.append(torch.stack([(trits == 0).float().mean(), flips, scales.mean()]))
        if not shares:
            return {}
        metrics: dict[str, float] = {}
        names = ("ternary/zeros", "ternary/flips", "ternary/scale")
        found = list(zip(layers, sizes, torch.stack(shares).tolist(), strict=True))  # the host sync
        for i in (None, *dict.fromkeys(layers)):
            chosen = [(size, values) for layer, size, values in found if i in (None, layer)]
            total = sum(size for size, _ in chosen)
            for name, column in zip(names, zip(*(values for _, values in chosen), strict=True), strict=True):
                mean = sum(size * value for (size, _), value in zip(chosen, column, strict=True)) / total
                metrics[name if i is None else f"{name}_{i}"] = mean
        return metrics

    def _some_rows(self, linear: BitLinear) -> tuple[Tensor, Tensor]:
        """Trits and scales of evenly spread rows of a matrix."""
        weight = ranks.whole(linear.weight)
        rows, columns = weight.shape
        count = max(1, min(rows, self.weights // columns))
        index = torch.linspace(0, rows - 1, count, device=weight.device).round().long()
        if linear.block == 0:  # one scale for all rows
            trits, scale = ternarise(weight, linear.block, linear.scale_format)
            return trits[index], scale
        return ternarise(weight if count == rows else weight[index], linear.block, linear.scale_format)

    def state_dict(self) -> dict[str, Any]:
        return {"looked": self._looked, "trits": {name: trits.cpu() for name, trits in self._trits.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._looked, self._trits = int(state_dict["looked"]), dict(state_dict["trits"])


def matrices(module: LightningModule) -> Iterator[tuple[int, str, BitLinear]]:
    """Layer, name and module of every ternary matrix of the blocks."""
    for layer, block in enumerate(module.gpt.blocks):  # type: ignore[union-attr, arg-type]
        for name, child in block.named_modules():
            if isinstance(child, BitLinear) and child.ternary:
                yield layer, f"blocks.{layer}.{name}", child
