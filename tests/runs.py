"""Small real runs for tests: composed by Hydra, trained by `run.train`."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from nanochat.config.schema import CONF

TIMES = {"train/tokens_per_second", "train/data_wait"}
"""columns of metrics.csv that no two runs share"""
TINY = [
    "model.dim=64", "model.n_layers=2", "model.n_heads=2", "model.n_kv_heads=2", "model.ffn_dim=128",
    "model.seq_len=32", "model.vocab_size=auto", "data=text", "tokenizer=byte", "data.batch_size=2",
    "data.val_batch_size=2", "data.val_tokens=200", "trainer=cpu", "trainer.precision=32-true", "compile=false",
]  # fmt: skip


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs this small are fastest on one thread, and threads that wait for each other are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def write_text(folder: Path, documents: int = 60) -> Path:
    """A folder of small texts out of a few words, the same every time."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        words = draw.choices(("tree", "river", "stone", "runs", "falls", "the", "a", "under", "\n"), k=60)
        (folder / f"{i:03}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


def words(place: Path) -> list[str]:
    """The overrides of a tiny run whose text and cache lie in `place`."""
    text = place / "text"
    if not text.exists():
        write_text(text)
    return [*TINY, f"data.paths=['{text}']", f"data.cache_dir='{place / 'cache'}'"]


def configure(place: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Its configuration."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*words(place), *overrides])


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv without the columns that are times."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def read_state(folder: Path, name: str = "last") -> dict[str, Any]:
    """What a checkpoint says of weights, optimizer, data position and random numbers."""
    checkpoint = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
    keys = ("state_dict", "optimizer_states", "global_step", "DataModule")
    return {**{key: checkpoint[key] for key in keys}, "rng": checkpoint["nanochat_run"]["rng"]}


def same(a: Any, b: Any, where: str = "") -> None:
    """Fail at the first difference in bits, dtype or shape."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}.{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert a == b, where
