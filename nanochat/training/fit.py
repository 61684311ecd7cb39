"""Whether a run fits into the memory there is: what is said before it starts, and `data.batch_size=auto`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from nanochat.config.vocabulary import plan_vocabulary
from nanochat.device import available_memory, find_device
from nanochat.errors import UserError
from nanochat.optim.offload import leaves
from nanochat.training.ledger import STATES
from nanochat.training.memory import Memory, predict
from nanochat.training.module import model_config

log = logging.getLogger(__name__)

USABLE = 0.9
"""share of the free memory that `auto` fills: allocators and kernels need some of their own"""
SAVED_BY_8BIT = 0.7
"""share of a 32-bit optimizer's state that its 8-bit variant does without, at the least"""
GIB = 2**30


def free_bytes(device: torch.device) -> int | None:
    """Memory that a run could still take on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    free = available_memory()
    return None if free is None else min([free, *_cgroup_bytes()])


def own_free_bytes(cfg: dict[str, Any]) -> int | None:
    """`free_bytes` of a run's device for one of its ranks: those on a CPU share the memory of the machine."""
    trainer = cfg["trainer"]
    device = find_device(trainer["accelerator"])
    free, count = free_bytes(device), trainer.get("devices")
    shared = device.type == "cpu" and isinstance(count, int) and count > 1
    return free // count if shared and free is not None else free


def _cgroup_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What the limits of this process' control groups leave, those of its parents among them."""
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        version1 = "memory" in controllers.split(",")
        if controllers and not version1:
            continue
        top = root / "memory" if version1 else root
        limit, used = "memory.max", "memory.current"
        if version1:
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        place = top / path.lstrip("/")
        for folder in (place, *place.parents):
            if not folder.is_relative_to(top):
                break
            try:
                most = int((folder / limit).read_text())  # `max`: no limit
                cache = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield max(0, most - int((folder / used).read_text()) + int(cache.get("inactive_file", 0)))
            except (OSError, ValueError):
                continue


def generous_bytes(cfg: dict[str, Any]) -> int:
    """More than a run takes, from its sizes alone: where this fits, nothing needs to be rehearsed."""
    config, (sequences, length) = model_config(cfg), (cfg["data"]["batch_size"], cfg["data"]["seq_len"])
    width, layers = config.dim, config.n_layers + int((cfg.get("mtp") or {}).get("tokens", 0))
    matrices = layers * (6 * width * width + 3 * width * config.ffn_dim)
    tables = (2 + config.value_embeddings) * config.vocab_size * width
    activations = sequences * length * layers * (width * (40 + 20 * config.streams) + 16 * config.ffn_dim)
    logits = max(2**26, 2 * max(512, length) * config.vocab_size)
    return 32 * (matrices + tables) + 4 * activations + 4 * logits


def check_fits(cfg: dict[str, Any], free: int | None = None) -> str | None:
    """What to tell the user of a run whose training will hardly fit; None for one that will.

    Args:
        cfg: a settled configuration.
        free: bytes; by default those of the run's device, for one rank.

    Raises:
        UserError: the weights and the optimizer's state alone do not fit, or what is offloaded does not.
    """
    cfg = plan_vocabulary(cfg)
    device = find_device(cfg["trainer"]["accelerator"])
    free = own_free_bytes(cfg) if free is None else free
    offloads = cfg.get("offload_optimizer") and leaves(device)  # into another memory, which may be the smaller one
    if free is None or (generous_bytes(cfg) <= free and not offloads):
        return None
    memory = predict(cfg)
    if memory.offloaded and (here := free_bytes(torch.device("cpu"))) is not None and memory.offloaded > here:
        raise UserError(
            f"offload_optimizer=true puts {memory.offloaded / GIB:.1f} GiB of optimizer state into the machine's "
            f"memory, which has {here / GIB:.1f} GiB free; an 8-bit optimizer has less of it (see optim=)."
        )
    if memory.peak <= free:
        return None
    where = "the GPU" if device.type == "cuda" else "this machine"
    text = (
        f"training is predicted to take {memory.peak / GIB:.1f} GiB at its peak ({memory.fixed / GIB:.1f} GiB of them "
        f"for weights and optimizer state), and {where} has {free / GIB:.1f} GiB free"
    )
    advice = "; ".join(remedies(cfg, memory))
    if memory.fixed > free:
        raise UserError(f"{text}: it cannot fit. A smaller model is needed{', or ' + advice if advice else ''}.")
    return f"{text[0].upper()}{text[1:]}{': ' + advice if advice else ''}."


def remedies(cfg: dict[str, Any], memory: Memory) -> Iterator[str]:
    """What would take less, and how much each of them saves."""
    if (cfg.get("activation_checkpointing") or "none") != "block":
        yield _saving(memory, predict({**cfg, "activation_checkpointing": "block"}), "activation_checkpointing=block")
    sequences, accumulate = cfg["data"]["batch_size"], cfg["trainer"].get("accumulate_grad_batches") or 1
    if sequences > 1:
        smaller = with_batch(cfg, 1, sequences * accumulate)
        change = f"data.batch_size=1 trainer.accumulate_grad_batches={sequences * accumulate}"
        yield _saving(memory, predict(smaller), change)
    if (cfg.get("weights") or "float32") == "float32":
        yield _saving(memory, predict({**cfg, "weights": "bfloat16"}), "weights=bfloat16 (a new run)")
    bits = [group.get("rule") for group in cfg["optim"].get("groups", {}).values()]
    if not any("8bit" in str(rule) for rule in bits):
        yield f"an 8-bit optimizer (see optim=) saves about {SAVED_BY_8BIT * memory.parts[STATES] / GIB:.1f} GiB"
    if leaves(find_device(cfg["trainer"]["accelerator"])) and not cfg.get("offload_optimizer"):
        yield _saving(memory, predict({**cfg, "offload_optimizer": True}), "offload_optimizer=true")


def _saving(before: Memory, after: Memory, change: str) -> str:
    return f"{change} saves {max(0, before.peak - after.peak) / GIB:.1f} GiB"


def with_batch(cfg: dict[str, Any], sequences: int, a_step: int) -> dict[str, Any]:
    """A copy with micro-batches of so many sequences, as many of them as make a step."""
    cfg = copy.deepcopy(cfg)
    cfg["data"]["batch_size"] = sequences
    cfg["trainer"]["accumulate_grad_batches"] = a_step // sequences
    return cfg


def choose_batch(cfg: dict[str, Any], folder: Path, free: int | None = None) -> dict[str, Any]:
    """The configuration with the largest micro-batch that fits; the optimizer sees as many sequences a step as before.

    Args:
        cfg: a settled configuration with the recipe's own `data.batch_size`.
        folder: of the run. One that has started keeps the micro-batch that was chosen then.
        free: bytes; by default those of the run's device, for one rank. Where they are not known nothing changes.
    """
    if cfg.get("ckpt_path") is not None and (folder / "config.yaml").is_file():
        saved: Any = OmegaConf.load(folder / "config.yaml")
        size, accumulate = saved.data.batch_size, saved.trainer.accumulate_grad_batches
        return with_batch(cfg, size, size * accumulate)
    planned = plan_vocabulary(cfg)
    free = own_free_bytes(cfg) if free is None else free
    if free is None:
        return cfg
    a_step = cfg["data"]["batch_size"] * (cfg["trainer"].get("accumulate_grad_batches") or 1)
    sizes = [size for size in range(1, a_step + 1) if a_step % size == 0]

    def fits(size: int) -> bool:
        changed = with_batch(planned, size, a_step)
        return generous_bytes(changed) <= USABLE * free or predict(changed).peak <= USABLE * free

    low, high = 0, len(sizes) - 1  # the answer is sizes[low .. high]: memory grows with the batch
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle - 1)
    chosen = with_batch(cfg, sizes[low], a_step)
    log.info(
        "data.batch_size=auto is %d, with trainer.accumulate_grad_batches=%d: %d sequences a step.",
        sizes[low], a_step // sizes[low], a_step,
    )  # fmt: skip
    return chosen
