"""Targets that saved configurations of earlier versions name, and what they are called now."""

from __future__ import annotations

from typing import Any

RENAMED = {
    "nanochat.lightning.": "nanochat.training.",
    "nanochat.objectives.collider.Collider": "nanochat.training.callbacks.collider.Collider",
    "lightning.pytorch.loggers.WandbLogger": "nanochat.reports.wandb_logger.WandbLogger",
}
"""the beginning of an old name -> that of the new one"""


def rename_targets(node: Any) -> Any:
    """A copy of a saved configuration in which every `_target_` has its present name."""
    if isinstance(node, dict):
        return {key: _renamed(value) if key == "_target_" else rename_targets(value) for key, value in node.items()}
    return [rename_targets(item) for item in node] if isinstance(node, list) else node


def _renamed(target: Any) -> Any:
    for old, new in RENAMED.items():
        if isinstance(target, str) and target.startswith(old):
            return new + target.removeprefix(old)
    return target
