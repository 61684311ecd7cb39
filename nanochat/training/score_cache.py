"""Losses of a reference model, kept on disk: computed once, read by every later run on the same data."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.model import GPT

HASH = 16  # bytes


class ScoreCache:
    """Per-token losses of whole sequences, by the sequences' content.

    A file per reference model and sequence length, `<fingerprint>-<T>.bin`: records of a 16-byte hash of tokens and
    targets and T float16 losses, only ever appended to. A record that was cut off (the run was killed) is not read.

    Args:
        folder: made if it is missing.
        reference: the model whose losses these are; its configuration and weights are the fingerprint.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path, reference: GPT) -> None:
        digest = hashlib.blake2b(repr(reference.config).encode(), digest_size=8)
        for tensor in reference.state_dict().values():
            digest.update(tensor.detach().cpu().float().numpy().tobytes())
        self.folder, self.fingerprint = folder, digest.hexdigest()
        self._losses: dict[int, dict[bytes, np.ndarray]] = {}  # by length, then by hash
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"collider.cache={folder} cannot be written: {error.strerror}.") from error

    def _of_length(self, length: int) -> dict[bytes, np.ndarray]:
        if length not in self._losses:
            record = np.dtype([("hash", f"V{HASH}"), ("losses", "<f2", (length,))])
            path = self._path(length)
            found = np.empty(0, record)
            if path.is_file():
                whole = path.stat().st_size // record.itemsize
                if path.stat().st_size > whole * record.itemsize:
                    with path.open("r+b") as file:
                        file.truncate(whole * record.itemsize)
                found = np.fromfile(path, record)
            self._losses[length] = {row["hash"].tobytes(): row["losses"] for row in found}
        return self._losses[length]

    def _path(self, length: int) -> Path:
        return self.folder / f"{self.fingerprint}-{length}.bin"

    @staticmethod
    def _hashes(tokens: Tensor, targets: Tensor) -> list[bytes]:
        both = torch.cat((tokens, targets), dim=1).cpu().numpy()
        return [hashlib.blake2b(row.tobytes(), digest_size=HASH).digest() for row in both]

    def get(self, tokens: Tensor, targets: Tensor) -> Tensor | None:
        """The losses (B, T) float32 of these sequences, or None when one of them is not there."""
        known = self._of_length(tokens.shape[1])
        rows = [known.get(key) for key in self._hashes(tokens, targets)]
        if any(row is None for row in rows):
            return None
        return torch.from_numpy(np.stack(rows).astype(np.float32)).to(tokens.device)  # type: ignore[arg-type]

    def put(self, tokens: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
        """Keep losses (B, T); returns them as `get` will."""
        known = self._of_length(tokens.shape[1])
        rounded = losses.detach().cpu().numpy().astype("<f2")
        records = b""
        for key, row in zip(self._hashes(tokens, targets), rounded, strict=True):
            if key not in known:
                known[key] = row
                records += key + row.tobytes()
        with self._path(tokens.shape[1]).open("ab", buffering=0) as file:
            file.write(records)  # at once: other ranks append to the same file
        return torch.from_numpy(rounded.astype(np.float32)).to(losses.device)
