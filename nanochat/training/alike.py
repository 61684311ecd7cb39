"""Whether all ranks of a job are about to do the same: same code, same torch, same command, same data."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import nanochat
from nanochat import ranks
from nanochat.data import DataModule
from nanochat.environment import COMMAND
from nanochat.errors import UserError


def check_alike(plain: dict[str, Any], data: DataModule) -> None:
    """Compare what the ranks are about to do; each of them has to ask.

    Raises:
        UserError: on every rank, with what differs and where.
    """
    if ranks.world() == 1:
        return
    here = {
        "nanochat's code": _digest_of_code(),
        "torch's version": str(torch.__version__),
        "the configuration": _digest(repr(sorted(plain.items()))),
        "the command line": _digest(os.environ.get(COMMAND, "")),
        "the data": _digest(repr(sorted(data.state_dict().items()))),
    }
    found: list[dict[str, str]] = [{}] * ranks.world()
    dist.all_gather_object(found, here)
    for name in here:
        others = [number for number, one in enumerate(found) if one[name] != found[0][name]]
        if others:
            numbers = ", ".join(map(str, others[:8])) + (", ..." if len(others) > 8 else "")
            raise UserError(
                f"the ranks are not about to train the same run: {name} of rank {numbers} differs from rank 0's; start "
                "all of them with the same installation, command and files."
            )


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest_of_code() -> str:
    digest = hashlib.blake2b(digest_size=16)
    root = Path(nanochat.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()
