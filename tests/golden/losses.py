"""Losses of the first steps of a small model for every optimizer; run this file to write them anew.

python -m tests.golden.losses
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from nanochat.config.compose import compose
from nanochat.objectives import linear_cross_entropy
from nanochat.run import settle
from nanochat.training.module import NanoChatModule

FILE = Path(__file__).with_name("losses.json")
OPTIMIZERS = sorted(path.stem for path in Path(__file__).parents[2].glob("conf/optim/*.yaml"))
STEPS = 20
MODEL = [
    "model=tiny",
    "model.dim=64",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.n_kv_heads=1",
    "model.ffn_dim=128",
    "model.seq_len=32",
    "model.vocab_size=64",
    "model.weight_block=64",
    "model.scale_format=float16",
    "model.int8=false",
    "model.tied=false",
    "tokenizer=byte",
    "data=synthetic",
    "callbacks=none",
    "logger=none",
    f"trainer.max_steps={STEPS}",
    "schedule=constant",
]


def batches() -> list[torch.Tensor]:
    """STEPS x (4, 33) tokens of a fixed Markov chain, which can be learnt."""
    generator = np.random.Generator(np.random.Philox(7))
    follows = generator.integers(64, size=(64, 2))
    rows = np.empty((STEPS, 4, 33), dtype=np.int64)
    rows[..., 0] = generator.integers(64, size=(STEPS, 4))
    for t in range(1, 33):
        choice = generator.integers(2, size=(STEPS, 4))
        rows[..., t] = follows[rows[..., t - 1], choice]
    return list(torch.from_numpy(rows))


def options(optimizer: str) -> list[str]:
    """The overrides of a golden run."""
    galore = ["optim.rank=16", "optim.lr=0.1"] if "galore" in optimizer else []  # else the head learns it all
    muon = ["optim.ns_dtype=float32"] if "muon" in optimizer else []  # machines differ in what auto is
    return [*MODEL, f"optim={optimizer}", *galore, *muon]


def losses(optimizer: str, overrides: Sequence[str] = ()) -> list[float]:
    """The loss before each of the first steps."""
    module = NanoChatModule(settle(compose([*options(optimizer), *overrides])))
    optim = module.configure_optimizers()
    found = []
    for step, rows in enumerate(batches()):
        optim.set_progress(step, STEPS, module.schedule)
        hidden = module.gpt.hidden(rows[:, :-1])
        loss = linear_cross_entropy(hidden, module.gpt.head_weight(), rows[:, 1:]).loss
        loss.backward()
        optim.step()
        optim.zero_grad()
        found.append(loss.item())
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.write_text(json.dumps({name: losses(name) for name in OPTIMIZERS}, indent=1) + "\n")
    print(f"wrote {FILE}")
