"""What is decided before torch is imported, and what the environment says of a job's ranks."""

from __future__ import annotations

import os
import platform
from typing import Any

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""what torchrun sets in a rank's environment, and our own launcher does too"""
COMMAND = "NANOCHAT_COMMAND"
"""the command line of a rank of torchrun, as it was given"""


def prepare_environment() -> None:
    """Let torch's CPU allocator use transparent huge pages; the variable is read when torch is loaded."""
    if platform.system() == "Linux":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def ranks_started() -> int:
    """The number of ranks that torchrun or our launcher has started, this process among them; 1: none has."""
    return int(os.environ["WORLD_SIZE"]) if all(os.environ.get(name) for name in RANK_VARIABLES) else 1


def rank_count(plain_cfg: dict[str, Any]) -> int:
    """How many ranks a settled configuration trains on."""
    trainer = plain_cfg.get("trainer") or {}
    devices = trainer.get("devices") or 1
    return (len(devices) if isinstance(devices, list) else int(devices)) * int(trainer.get("num_nodes") or 1)
