"""Small models, run folders and a byte tokenizer for the tests of inference and export."""

from __future__ import annotations

from pathlib import Path

import torch

from nanochat.model import GPT, GPTConfig

SMALL = GPTConfig(
    vocab_size=300,
    dim=64,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=96,
    seq_len=48,
    tied=False,
    zero_init=False,
)


def random_gpt(config: GPTConfig = SMALL, seed: int = 0) -> GPT:
    """A GPT whose every parameter matters: random gains, and branches that outweigh the embedding."""
    gpt = GPT(config, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in gpt.parameters():
            if parameter.ndim == 1:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
        for block in gpt.blocks:
            block.attention.o.weight.mul_(4)
            block.feedforward.down.weight.mul_(4)
        gpt.embedding.weight.normal_(0, 0.3, generator=generator)
        if gpt.head is not None:
            gpt.head.weight.normal_(0, 0.3, generator=generator)
    return gpt


class ByteTokenizer:
    """Byte b is token b; 256 separates documents."""

    vocab_size = 257
    eot_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def decode(self, tokens: list[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode(errors="replace")


def write_run(folder: Path, gpt: GPT, name: str = "last", **extra) -> Path:
    """A run folder as training leaves it (without a tokenizer)."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    gpt.config.to_json(folder / "model.json")
    state = {f"gpt.{key}": value for key, value in gpt.state_dict().items()}
    state |= {f"objectives.{key}": value for key, value in extra.pop("objectives", {}).items()}
    checkpoint = {"state_dict": state, "global_step": 7, "nanochat_format": 1, **extra}
    torch.save(checkpoint, folder / "checkpoints" / f"{name}.ckpt")
    return folder
