"""Rules that need torch: the device is there, and the parts can be built."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

from nanochat.config.features import feature_nodes
from nanochat.config.rules import DEVICES, Rule, Values
from nanochat.config.schema import Problem
from nanochat.config.takes_part import idle_rates
from nanochat.config.vocabulary import SMALLEST_VOCABULARY, build_data, plan_vocabulary
from nanochat.errors import ConfigError, UserError


def device_exists(values: Values) -> Iterator[Problem]:
    """The chosen device is there, and can compute in the chosen precision."""
    import torch

    trainer = values.node("trainer")
    device = trainer.get("accelerator", "auto")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if isinstance(device, str) and {"cuda": not cuda, "gpu": not (cuda or mps), "mps": not mps}.get(device, False):
        text = f"trainer.accelerator={device}: this machine has no such device; choose trainer=cpu or trainer=auto."
        yield Problem("trainer.accelerator", text)
    yield from _devices_exist(trainer.get("devices"), device)
    precision = str(trainer.get("precision", ""))
    if precision in ("16", "16-mixed", "16-true"):
        text = f"trainer.precision={precision} is too narrow for gradients that are not scaled"
        yield Problem("trainer.precision", f"{text}; use bf16-mixed, 32-true or auto.")
    elif precision.startswith("64") and (device == "mps" or (device == "auto" and mps and not cuda)):
        text = f"trainer.precision={precision}: this device has no float64; use bf16-mixed, 32-true or auto."
        yield Problem("trainer.precision", text)
    elif precision.startswith("transformer-engine") and importlib.util.find_spec("transformer_engine") is None:
        text = f"trainer.precision={precision} needs the package transformer_engine; use bf16-mixed, 32-true or auto."
        yield Problem("trainer.precision", text)


def _devices_exist(devices: Any, accelerator: Any) -> Iterator[Problem]:
    import torch

    from nanochat.device import find_device

    device = find_device(accelerator) if accelerator in DEVICES else None
    there = {"cuda": torch.cuda.device_count(), "mps": 1}.get(getattr(device, "type", ""))
    if device is not None and device.type == "cpu" and isinstance(devices, list):
        text = f"trainer.devices={devices}: a CPU has no numbers; give the number of ranks, trainer.devices=N."
        yield Problem("trainer.devices", text)
    asked = max(devices) + 1 if isinstance(devices, list) else devices
    if device is not None and there and isinstance(asked, int) and asked > there:
        text = f"trainer.devices={devices}: this machine has {there} {device.type} device{'s' * (there > 1)}."
        yield Problem("trainer.devices", text)


def parts_are_possible(values: Values) -> Iterator[Problem]:
    """What the constructors of the parts refuse: heads divide the width, a rate is positive, ..."""
    from hydra.utils import instantiate
    from lightning import Callback

    from nanochat.model import GPTConfig
    from nanochat.objectives import NextToken

    nodes = {key: values.node(key) for key in ("schedule", "tokenizer")}
    nodes |= {f"callbacks.{name}": values.node(f"callbacks.{name}") for name in values.get("callbacks") or {}}
    sound = {key: values.node(key) for key in values.plain}
    nodes |= feature_nodes(sound, Callback)  # those that are objectives are built with the optimizer
    builds: dict[str, Callable[[], Any]] = {
        key: lambda node=node: instantiate(node)  # type: ignore[misc]
        for key, node in nodes.items()
        if node
    }
    if sound["data"] and sound["tokenizer"]:
        builds["data"] = lambda: build_data(sound)
    if sound["model"]:
        builds["model"] = lambda: GPTConfig.from_dict(_options(_planned(values)["model"]))
    if sound.get("loss"):
        builds["loss"] = lambda: NextToken(GPTConfig(), **sound["loss"])
    for key, build in builds.items():
        yield from _tried(build, key)


def optimizer_is_possible(values: Values) -> Iterator[Problem]:
    """Rules, ranks and groups against the parameters of this very model, on the meta device."""
    if any(values.bad(key) for key in ("model", "optim", "schedule", "trainer", "loss")):
        return
    import torch

    from nanochat.training.module import NanoChatModule

    def build() -> None:
        plain = {key: value for key, value in _planned(values).items() if not values.bad(key)}
        with torch.device("meta"):
            module = NanoChatModule(plain)
            groups.extend(module.configure_optimizers().param_groups)
        names = [name for name, parameter in module.named_parameters() if not parameter.ndim]
        if names and plain["trainer"].get("strategy") == "fsdp2":
            raise UserError(
                f"trainer=fsdp2 cuts parameters into rows, and {names[0]} is a single number: give it the shape (1,), "
                "or use trainer=ddp."
            )

    groups: list[dict[str, Any]] = []
    yield from _tried(build, "optim")
    if groups:
        yield from idle_rates(values.plain["optim"], {group["name"] for group in groups})


def _planned(values: Values) -> dict[str, Any]:
    """The values with a number for a vocabulary of `auto`; any will do where the data's own problems are reported."""
    try:
        return plan_vocabulary(values.plain)
    except Exception:
        return {**values.plain, "model": {**values.plain["model"], "vocab_size": SMALLEST_VOCABULARY}}


def _options(node: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in node.items() if not key.startswith("_")}


def _tried(build: Callable[[], Any], key: str) -> Iterator[Problem]:
    """Problems that building something raises."""
    try:
        build()
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        if isinstance(cause, ConfigError):
            texts = cause.problems
        elif isinstance(cause, UserError):
            texts = [str(cause)]
        else:
            line = (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
            texts = [f"{key} cannot be used: {line}."]
        yield from (Problem(key, text) for text in texts)


TORCH_RULES: list[Rule] = [device_exists, parts_are_possible, optimizer_is_possible]
"""run where no other problem was found; those that build come last"""
