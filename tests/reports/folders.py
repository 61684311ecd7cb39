"""Run folders as training leaves them, written without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from nanochat.model import GPTConfig

TEXT = "text: 54 documents of 0.1 MB, 15,007 tokens to train on; 6 of 0.01 MB, 1,685 tokens to validate (10%); byte"


def write_run(
    folder: Path,
    bpb: float | None,
    seed: int = 0,
    words: list[str] | None = None,
    steps: int = 40,
    optim: str = "muon",
    text: str = TEXT,
    paths: str = "a",
    status: str = "finished",
    **summary: Any,
) -> Path:
    """A run whose loss falls to `bpb` (nats alike), at 100 tokens a step and 1000 tokens a second."""
    folder.mkdir(parents=True)
    config = {
        "seed": seed,
        "task_name": "tiny",
        "model": {"_target_": "nanochat.model.config.GPTConfig", "dim": 64},
        "optim": {"_target_": "nanochat.optim.build", "lr": 0.1, "groups": {"matrices": {"rule": optim}}},
        "data": {"_target_": "x", "corpus": "text", "paths": [paths], "seed": seed, "val_tokens": None},
        "tokenizer": {"_target_": "nanochat.data.tokenizer.Byte"},
        "trainer": {"max_steps": steps},
        "callbacks": {"sampler": {"seed": 0}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    GPTConfig(dim=64, n_heads=2, n_kv_heads=2, n_layers=1, ffn_dim=128, vocab_size=257).to_json(folder / "model.json")
    last = 9.0 if bpb is None else bpb
    rows = ["step,train/loss,train/tokens_per_second,optim/bytes,val/loss,val/bpb"]
    for step in range(1, steps + 1):
        loss = last + (steps - step) / steps
        rows.append(f"{step},{loss},1000,800,,")
        if step % (steps // 4) == 0:
            rows.append(f"{step},,,,{loss},{loss}")
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    (folder / "samples.md").write_text("## Step 40\n\nval/loss 1\n\nPrompt: 'a'\n\n```\na <b>river</b>\n```\n")
    found = {
        "status": status, "step": steps, "tokens": 100 * steps, "val/bpb": bpb, "val/loss": bpb, "optim/bytes": 800,
        "parameters": 1000, "seconds": 5.0, "data": text, "overrides": [*(words or []), f"seed={seed}"],
        "command": f"train.py -m {' '.join(words or [])} seed=0,1,2", "commit": "abc", "torch": "2.13", **summary,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(found))
    return folder


def write_sweep(folder: Path, seeds: int = 3) -> Path:
    """Two optimizers and some seeds; muon is better by 0.5, 0.6, 0.7, ..."""
    for seed in range(seeds):
        write_run(folder / str(seed), 2.0 + seed, seed, ["optim=adamw"], optim="adamw")
        write_run(folder / str(seeds + seed), 1.5 + 0.9 * seed, seed, ["optim=muon"], optim="muon")
    return folder
