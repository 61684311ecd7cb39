"""Small trained models with a tokenizer, and the real llama.cpp."""

from __future__ import annotations

import dataclasses
import os
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanochat.checkpoint import Run, load_run
from nanochat.data.tokenizer import BPE, Tokenizer
from nanochat.export import llama_cpp
from nanochat.model import GPT, GPTConfig
from tests.inference.helpers import write_run

BASE = GPTConfig(vocab_size=512, dim=256, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=384, seq_len=256)
VARIANTS = {
    "qwen3": BASE,
    "llama": dataclasses.replace(BASE, qk_norm=False, tied=False, embedding_norm=False),
    "bitnet": dataclasses.replace(BASE, qk_norm=False, sub_norm=True, embedding_norm=False),
}


@pytest.fixture(scope="session")
def llama() -> llama_cpp.LlamaCpp:
    """The real llama.cpp; skipped only where it cannot be had, and never in CI."""
    try:
        llama_cpp.fetch()
        return llama_cpp.load()
    except llama_cpp.LlamaCppUnavailable as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"NO LLAMA.CPP, THE EXPORT IS NOT PROVEN HERE: {error}")


@pytest.fixture(scope="session")
def text() -> str:
    """400 kB of Python."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return "\n".join(file.read_text(errors="replace") for file in files)[:400_000]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory, text) -> Path:
    """A byte-level BPE of 500 tokens, fewer than the models'."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    BPE(500).build([text]).save(path)
    return path


@pytest.fixture(scope="session")
def corpus(tokenizer_file, text) -> torch.Tensor:
    """The tokens of the text."""
    return torch.tensor(Tokenizer.load(tokenizer_file).encode(text))


@torch.enable_grad()
def train(gpt: GPT, corpus: torch.Tensor, steps: int, length: int = 64, batch: int = 8) -> float:
    """A few steps of AdamW, so that the weights are not noise; returns the last loss."""
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        starts = torch.randint(len(corpus) - length - 1, (batch,), generator=generator)
        window = torch.stack([corpus[start : start + length + 1] for start in starts])
        loss = F.cross_entropy(gpt(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.fixture(scope="session")
def runs(tmp_path_factory, tokenizer_file, corpus):
    """`runs(name)`: a run folder of a trained variant, made once a session."""
    made: dict[str, Path] = {}

    def make(name: str, config: GPTConfig | None = None, steps: int = 40) -> Run:
        if name not in made:
            gpt = GPT(config or VARIANTS[name], seed=0)
            assert train(gpt, corpus, steps) < 5.5 or not steps
            folder = write_run(tmp_path_factory.mktemp("runs") / name, gpt)
            (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
            made[name] = folder
        return load_run(made[name])

    return make
