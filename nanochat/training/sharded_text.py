"""Text of a model in training, also of one that is sharded over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from lightning import LightningModule
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from nanochat.inference import Sampling, TorchBackend, generate_text
from nanochat.model import GPT

if TYPE_CHECKING:
    from nanochat.data.tokenizer import Tokenizer


class ShardedBackend(TorchBackend):
    """A network of which each rank has a part: all ranks have to make the same calls, and get the same logits.

    They are rank 0's, since ranks whose last bits differ could draw different tokens, and then wait for each other.

    Args:
        gpt: with the parameters outside of its blocks gathered.
        slots: sequences at once.
        vocab_limit: logits beyond it are left out.
    """

    def __init__(self, gpt: GPT, slots: int, vocab_limit: int) -> None:
        # a try with every shape of matrix would need whole matrices
        super().__init__(gpt, slots, vocab_limit=vocab_limit, rows=slots)

    def prefill(self, slot: int, start: int, tokens: Sequence[int], everything: bool = False) -> Tensor:
        return _from_rank_zero(super().prefill(slot, start, tokens, everything))

    def decode(self, slots: Sequence[int], starts: Sequence[int], tokens: Sequence[int]) -> Tensor:
        return _from_rank_zero(super().decode(slots, starts, tokens))


@torch.inference_mode()
def _from_rank_zero(logits: Tensor) -> Tensor:
    shared = logits.contiguous()
    dist.broadcast(shared, 0)
    return shared


def write_text(
    module: LightningModule,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int,
    sampling: Sampling,
    seed: int,
) -> list[str]:
    """`generate_text` by a module's network. If that is sharded, all ranks have to ask; each token then gathers every
    block in turn, so that no rank ever holds more than in a validation."""
    gpt: GPT = module.gpt  # type: ignore[assignment]
    if not isinstance(module, FSDPModule):
        return generate_text(gpt, tokenizer, prompts, max_tokens, sampling, seed)
    module.unshard()
    try:
        with torch.compiler.set_stance("force_eager"):  # blocks are compiled for training's shapes
            backend = ShardedBackend(gpt, max(1, len(prompts)), tokenizer.vocab_size)
            return generate_text(backend, tokenizer, prompts, max_tokens, sampling, seed)
    finally:
        module.reshard()
