"""A tiny network with the product's parameter names, and optimizers built from the shipped configs."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from nanochat.optim import Optimizer, build

CONF = Path(__file__).parents[2] / "conf" / "optim"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))


def config(name: str, **changes: Any) -> dict[str, Any]:
    """The arguments of `build` in conf/optim/NAME.yaml."""
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    return {k: v for k, v in values.items() if not k.startswith("_")} | changes


class Layer(nn.Module):
    def __init__(self, dim: int, wide: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.up = nn.Linear(dim, wide, bias=False)
        self.down = nn.Linear(wide, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


class Net(nn.Module):
    """A language model without attention: embedding.weight, blocks.*, norm.weight, head.weight."""

    def __init__(self, vocab: int = 64, dim: int = 64, wide: int = 128, layers: int = 2, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Layer(dim, wide) for _ in range(layers))
        self.norm = nn.RMSNorm(dim)
        self.head = None if tied else nn.Linear(dim, vocab, bias=False)

    def loss(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        weight = self.embedding.weight if self.head is None else self.head.weight
        logits = F.linear(self.norm(x), weight)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def make(name: str, net: nn.Module, **changes: Any) -> Optimizer:
    """conf/optim/NAME.yaml over a network whose names get the LightningModule's prefix."""
    return build([(f"gpt.{n}", p) for n, p in net.named_parameters()], **config(name, **changes))


def batch(step: int, vocab: int = 64) -> Tensor:
    """(4, 32) tokens with something to learn: runs with a random stride."""
    generator = torch.Generator().manual_seed(step)
    start, stride = torch.randint(0, vocab, (2, 4, 1), generator=generator)
    return (start + torch.arange(32) * (1 + stride % 3)) % vocab


def train(net: Net, optimizer: Optimizer, first: int, steps: int, max_steps: int = 100) -> list[float]:
    """Losses of the steps [first, first + steps) under a flat schedule."""
    losses = []
    for step in range(first, first + steps):
        optimizer.set_progress(step, max_steps, lambda s, m: 1.0)
        optimizer.zero_grad()
        loss = net.loss(batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def single(parameter: Tensor, rule: str, lr: float, weight_decay: float = 0.0, **options: Any) -> Optimizer:
    """One parameter updated by one rule."""
    group = {"rule": rule, **options}
    return build([("w", nn.Parameter(parameter))], lr=lr, weight_decay=weight_decay, groups={"all": group})


def only(optimizer: Optimizer) -> nn.Parameter:
    """The parameter of an optimizer made by `single`."""
    return optimizer.param_groups[0]["params"][0]


def reloaded(net: Net, optimizer: Optimizer, make_optimizer: Callable[[Net], Optimizer]) -> tuple[Net, Optimizer]:
    """A copy of a network, and an optimizer of its own with the state of the given one, through a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = copy.deepcopy(net)
    loaded = make_optimizer(again)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    return again, loaded
