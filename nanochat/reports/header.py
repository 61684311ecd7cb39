"""What a run is, in lines that its header and its card share."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from nanochat.config.schema import NODE_GROUPS, PLAIN_KEYS, TARGET_GROUPS
from nanochat.device import capabilities
from nanochat.environment import rank_count

WEIGHTS = {"bfloat16": "weights in bfloat16", "bfloat16-master": "weights in bfloat16 with float32 copies"}


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


def describe_techniques(plain_cfg: dict[str, Any], trainer: Any, module: Any) -> str:
    """What the run has beyond the plain recipe; empty for nothing.

    The network's own switches, then what objectives and callbacks with a method `describe()` say of themselves, then
    the names of the features that say nothing.
    """
    model, texts = plain_cfg["model"], []
    if text := WEIGHTS.get(plain_cfg.get("weights") or ""):
        texts.append(text)
    if model.get("int8") is True:
        texts.append("int8 forward and backward" if model.get("int8_backward") else "int8 forward")
    if tables := model.get("value_embeddings"):
        texts.append(f"{tables} table{'s' if tables > 1 else ''} of value embeddings ({model.get('value_gate')} gate)")
    if (streams := model.get("streams", 1)) > 1:
        texts.append(f"{streams} residual streams ({model.get('stream_maps')} maps)")
    speaking = [part for part in (*module.objectives.values(), *trainer.callbacks) if hasattr(part, "describe")]
    texts += [part.describe() for part in speaking]
    known = {*PLAIN_KEYS, *TARGET_GROUPS, *NODE_GROUPS}
    nodes = {key: node for key, node in plain_cfg.items() if key not in known and isinstance(node, dict)}
    heard = {type(part).__name__ for part in speaking}
    texts += [k for k, n in nodes.items() if "_target_" in n and n["_target_"].rpartition(".")[2] not in heard]
    return ", ".join(filter(None, texts))


def tokens_per_step(plain_cfg: dict[str, Any]) -> int:
    """Tokens of one optimizer step, on all ranks."""
    data, trainer = plain_cfg["data"], plain_cfg["trainer"]
    micro_batches = int(trainer.get("accumulate_grad_batches", 1)) * rank_count(plain_cfg)
    return micro_batches * int(data["batch_size"]) * int(data["seq_len"])


def describe_machine(device: torch.device) -> str:
    """What the run computed on."""
    system = f"{platform.system()} {platform.machine()}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB; {system}"
    name = capabilities().get("cpu_name") or platform.processor() or "CPU"
    kind = "" if device.type == "cpu" else f" ({device.type})"
    threads = torch.get_num_threads()
    return f"{name}{kind}, {threads} thread{'s' * (threads > 1)} on {os.cpu_count()} logical cores; {system}"


def peak_resident_bytes() -> int | None:
    """The most memory that this process has held; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else 1024 * found
