"""How Lightning's checkpoints reach the disk and come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from nanochat.checkpoint import read_checkpoint
from nanochat.files import atomic_write


class WholeFileIO(CheckpointIO):
    """Writes a checkpoint aside, syncs and renames it; reads none whose checksums do not match.

    A plugin of the Trainer, so that `Trainer.save_checkpoint` and `fit(ckpt_path=...)` use it.

    Raises:
        OSError, RuntimeError: the file cannot be written (torch makes a RuntimeError of a failed write).
        UserError: the file cannot be read, see `read_checkpoint`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with atomic_write(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path, mmap=False)  # the optimizer keeps tensors of it, and the file is removed one day

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)
