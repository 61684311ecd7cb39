"""What ends a run from outside, in one sentence: too little memory, a device or a connection that is gone."""

from __future__ import annotations

import re
from typing import Any

import torch

from nanochat.errors import UserError
from nanochat.run_lock import TRY_LATER

NO_MEMORY = re.compile(r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED|unable to allocate", re.I)
LOST = re.compile(
    r"CUDA error|cuDNN error|CUBLAS_STATUS|NCCL|gloo|collective operation timeout|ProcessGroup|"
    r"Connection (?:closed|reset) by peer|"
    r"Timed out waiting|Socket Timeout|Wait timeout",
    re.I,
)
TIMED_OUT = re.compile(r"timed? ?-?out", re.I)
OWN_FAULT = re.compile(r"device-side assert|no kernel image|invalid (?:argument|configuration|device)", re.I)
"""CUDA errors that would come again"""


class LostDeviceError(UserError):
    """A device or a connection failed; the same command may work on the next attempt."""

    exit_code = TRY_LATER


class SilentRankError(LostDeviceError):
    """Ranks have waited in vain for another one, which may still be there."""


def is_lost(error: BaseException) -> bool:
    """Whether an exception says that a device, or the connection to another rank, is gone."""
    text = str(error)
    said = isinstance(error, RuntimeError | OSError) and LOST.search(text) and not OWN_FAULT.search(text)
    return bool(said) or isinstance(error, torch.distributed.DistBackendError)


def in_words(error: BaseException, plain: dict[str, Any], step: int, saved: str | None) -> UserError | None:
    """The sentence for an exception of training; None for one that is a mistake in the code.

    Args:
        plain: the run's settled configuration.
        step: optimizer steps done.
        saved: the newest checkpoint, if there is one.
    """
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and NO_MEMORY.search(text)
    ):
        return UserError(f"the memory is full in step {step + 1}: {'; or '.join(smaller(plain))}.")
    if is_lost(error):
        if torch.distributed.is_initialized() and TIMED_OUT.search(text):
            waited = f"ranks have waited for {plain.get('rank_timeout') or '30m'} (rank_timeout) for one that is silent"
            return SilentRankError(f"{waited}, after step {step}; {_next_start(saved)}.")
        return LostDeviceError(
            f"the device or a connection failed after step {step} ({text[:160]}); {_next_start(saved)}."
        )
    return None


def _next_start(saved: str | None) -> str:
    return f"resume from {saved} with ckpt_path=auto" if saved else "there is no checkpoint yet, so start again"


def smaller(plain: dict[str, Any]) -> list[str]:
    """What lowers the peak of memory, the cheapest first; only what this run does not have yet."""
    data, trainer, loss = plain.get("data") or {}, plain.get("trainer") or {}, plain.get("loss") or {}
    batch, accumulate = int(data.get("batch_size") or 1), int(trainer.get("accumulate_grad_batches") or 1)
    ways = []
    if batch > 1 and batch % 2 == 0:
        ways.append(
            f"data.batch_size={batch // 2} trainer.accumulate_grad_batches={2 * accumulate} is the same step in about "
            "half the memory for activations"
        )
    elif batch > 1:
        ways.append(f"data.batch_size={batch - 1}")
    if plain.get("activation_checkpointing", "none") == "none":
        ways.append("activation_checkpointing=block recomputes activations instead of keeping them")
    if loss.get("chunk") is None or int(loss["chunk"]) > 64:
        ways.append("loss.chunk=64 keeps fewer logits")
    if "8bit" not in str((plain.get("optim") or {}).get("groups")):
        ways.append("optim=muon8bit keeps its state in a quarter of the bytes (a new run)")
    if trainer.get("accelerator") == "cuda" and not plain.get("offload_optimizer"):
        ways.append("offload_optimizer=true keeps the optimizer's state in the CPU's memory")
    if int(data.get("seq_len") or 0) > 128:
        ways.append(f"data.seq_len={int(data['seq_len']) // 2}")
    return ways or ["choose a smaller model"]
