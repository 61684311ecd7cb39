"""llama.cpp as a backend: the pinned binaries of `nanochat.export.llama_cpp`, with a sequence for each slot.

Driving them through ctypes keeps one scheduler and one sampler for both backends, so that the same request means the
same thing; a binding with a server of its own inside would bring others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.export.llama_cpp import LlamaModel
from nanochat.inference.scheduler import PIECE


class LlamaBackend:
    """A GGUF file with slots.

    Args:
        path: the file.
        slots: sequences at once.
        context: tokens of each; None takes what the model was trained with, at most 8,192.
        threads: of llama.cpp.
        vocab_limit: logits beyond it are left out.

    Raises `UserError` when llama.cpp refuses the file or has no memory for the cache.
    """

    name = "llama.cpp"
    drafts, draft_cost = 0, 0.0

    def __init__(
        self,
        path: str | Path,
        slots: int = 1,
        context: int | None = None,
        threads: int = 1,
        vocab_limit: int | None = None,
    ) -> None:
        self.slots = slots
        self.model = LlamaModel(
            path, context=context or 0, threads=threads, float_cache=False, sequences=slots, batch=max(PIECE, slots)
        )
        self.context = self.model.context_size
        self.vocab_size = min(vocab_limit or self.model.vocab_size, self.model.vocab_size)
        try:  # a file that cannot write text is refused now, and not with the first request
            self.prefill(0, 0, [0])
        except UserError:
            self.close()
            raise
        self.truncate(0, 0)

    def prefill(self, slot: int, start: int, tokens: Sequence[int], everything: bool = False) -> Tensor:
        places = [(token, start + index, slot) for index, token in enumerate(tokens)]
        wanted = range(len(tokens)) if everything else [len(tokens) - 1]
        return self._logits(places, wanted)

    def decode(self, slots: Sequence[int], starts: Sequence[int], tokens: Sequence[int]) -> Tensor:
        return self._logits(list(zip(tokens, starts, slots, strict=True)), range(len(tokens)))

    def _logits(self, places: Sequence[tuple[int, int, int]], wanted: Sequence[int]) -> Tensor:
        return torch.from_numpy(self.model.decode(places, wanted))[:, : self.vocab_size]

    def truncate(self, slot: int, length: int) -> bool:
        return self.model.forget(slot, length)

    def draft(self, slot: int, tokens: Sequence[int], count: int) -> list[int]:
        return []

    def embed(self, tokens: Sequence[int]) -> Tensor:
        raise UserError(
            "embeddings need the torch backend (--backend torch), which runs the models that nanochat wrote."
        )

    def close(self) -> None:
        self.model.close()
