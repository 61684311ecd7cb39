"""What a file says about its model: name, data, result, command, commit; taken from the run's own folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.run_folder import read_summary

if TYPE_CHECKING:
    from nanochat.checkpoint import Run


def _summary(folder: Path) -> dict[str, Any]:
    """`summary.json` as one flat mapping; empty when the run did not come to its end."""
    flat: dict[str, Any] = {}
    for key, value in read_summary(folder).items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


def run_settings(run: Run) -> dict[str, Any]:
    """The configuration in a run's checkpoint; empty without one."""
    settings: dict[str, Any] = run.meta.get("hyper_parameters") or {}
    return settings.get("cfg", settings)


def size_label(parameters: int) -> str:
    """3670016 -> "3.7M"."""
    for divisor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= divisor:
            return f"{parameters / divisor:.3g}{letter}"
    return str(parameters)


def model_card(run: Run, name: str | None = None, licence: str | None = None) -> dict[str, Any]:
    """Keys of GGUF's `general.*` and our `nanochat.*` that describe a run.

    name: by default the run's `task_name`, else its folder's; licence: an SPDX identifier.
    """
    settings = run_settings(run)
    summary = _summary(run.folder)
    parameters = sum(parameter.numel() for parameter in run.gpt.parameters())
    steps = run.meta.get("step", 0)
    data = settings.get("data")
    corpus = summary.get("data") or (data.get("corpus") if isinstance(data, dict) else None)
    bpb = summary.get("val/bpb")
    weights = "ternary" if run.config.ternary else "float"
    card: dict[str, Any] = {
        "general.name": name or settings.get("task_name") or run.folder.resolve().name,
        "general.size_label": size_label(parameters),
        "general.tags": ["text-generation", "nanochat", weights],
        "general.description": f"A {weights} GPT of {size_label(parameters)} parameters after {steps} steps"
        + (f", {bpb:.4f} bits per byte on held-out text" if isinstance(bpb, float) else "")
        + ", trained with nanochat.",
        "nanochat.step": int(steps),
    }
    if licence:
        card["general.license"] = licence
    if isinstance(bpb, float):
        card["nanochat.val_bpb"] = bpb
    for key, value in (("data", corpus), ("command", summary.get("command")), ("commit", summary.get("commit"))):
        if isinstance(value, str) and value:
            card[f"nanochat.{key}"] = value
    return card
