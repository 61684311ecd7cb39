"""What a run is, in lines that its header and its card share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer


def describe_model(plain_cfg: dict[str, Any], parameters: int | None) -> str:
    """The task, the kind of weights and the sizes."""
    model = plain_cfg["model"]
    kind = "ternary" if model.get("ternary") else "float"
    sizes = f"{parameters or 0:,} parameters, width {model['dim']}, {model['n_layers']} layers"
    return f"{plain_cfg.get('task_name', '')}: {kind}, {sizes}"


def describe_optimizer(plain_cfg: dict[str, Any], optimizers: Sequence[Optimizer]) -> str:
    """The rules of the one optimizer's groups, and the learning rate."""
    rules = dict.fromkeys(group["rule"] for group in optimizers[0].param_groups) if optimizers else {}
    return f"{' + '.join(rules)}, lr {plain_cfg['optim']['lr']:g}"


def tokens_per_step(plain_cfg: dict[str, Any]) -> int:
    """Tokens of one optimizer step."""
    data, trainer = plain_cfg["data"], plain_cfg["trainer"]
    return int(trainer.get("accumulate_grad_batches", 1)) * int(data["batch_size"]) * int(data["seq_len"])
