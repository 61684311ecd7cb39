"""`nanochat doctor`: what this machine has, what will work on it, and a few seconds of real training as the proof."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanochat.bench.measure import show
from nanochat.model import GPT, GPTConfig
from nanochat.objectives import linear_cross_entropy

PACKAGES = ("nanochat", "torch", "lightning", "hydra-core", "tokenizers", "numpy")
EXTRAS = {
    "gguf": "export to GGUF",
    "safetensors": "export to safetensors",
    "wandb": "logger=wandb",
    "bitsandbytes": "8-bit optimizer kernels on CUDA",
}
SMOKE_SECONDS = 5.0


def versions() -> dict[str, str]:
    """Package -> version, or `missing`."""
    found = {}
    for package in (*PACKAGES, *EXTRAS):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def device() -> str:
    """The device that `trainer=auto` takes, in words."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"cuda: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, bf16-mixed"
    if torch.backends.mps.is_available():
        return "mps, 32-true"
    return f"cpu: {torch.get_num_threads()} threads, 32-true"


def compiler() -> str:
    """Whether `compile=true` can work."""
    if torch.cuda.is_available():
        return "yes" if importlib.util.find_spec("triton") else "no: triton is missing"
    return (
        "yes (slow to start, gains little on a CPU)"
        if shutil.which("g++") or shutil.which("clang++")
        else "no: no C++ compiler"
    )


def smoke_test(budget: float = SMOKE_SECONDS) -> dict[str, float]:
    """Train a small ternary model on one repeated batch for `budget` seconds; its loss must fall."""
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = GPT(
        GPTConfig(vocab_size=512, dim=128, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=256, seq_len=64), seed=0
    )
    model.to(where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.randint(512, (8, 65), generator=torch.Generator().manual_seed(0)).to(where)
    start, steps, first, last = time.perf_counter(), 0, 0.0, 0.0
    while steps < 3 or time.perf_counter() - start < budget:
        loss = linear_cross_entropy(model.hidden(tokens[:, :-1]), model.head_weight(), tokens[:, 1:]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        last = loss.item()
        first = first or last
        steps += 1
    taken = time.perf_counter() - start
    return {"first_loss": first, "last_loss": last, "steps": steps, "tokens_per_second": steps * 512 / taken}


def _try(function: Callable[[], str]) -> str:
    try:
        return function()
    except OSError as error:
        return f"no: {error.strerror}"


def writable(folder: Path) -> str:
    """Whether runs can be written to a folder, and the space left there."""
    nearest = folder
    while not nearest.exists():
        nearest = nearest.parent
    if not os.access(nearest, os.W_OK):
        return f"no: {nearest} is read-only"
    return f"yes, {shutil.disk_usage(nearest).free / 2**30:.0f} GiB free"


def main(argv: list[str]) -> int:
    """Print what was found; exit code 1 when the smoke test does not learn."""
    parser = argparse.ArgumentParser(prog="nanochat doctor", description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=SMOKE_SECONDS, help="length of the training smoke test")
    options = parser.parse_args(argv)
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": device(),
        "compile": compiler(),
        "huge pages for torch": "on" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "off",
        "outputs/ can be written": _try(lambda: writable(Path("outputs").absolute())),
        "versions": versions(),
    }
    smoke = smoke_test(options.seconds)
    found["smoke test"] = smoke
    learns = smoke["last_loss"] < 0.9 * smoke["first_loss"]
    if options.json:
        print(json.dumps({**found, "ok": learns}, indent=2))
        return 0 if learns else 1
    rows = [[key, value] for key, value in found.items() if isinstance(value, str)]
    for package, version in found["versions"].items():
        hint = f"missing: needed for {EXTRAS[package]}" if version == "missing" and package in EXTRAS else version
        rows.append([package, hint])
    verdict = "learns" if learns else "does NOT learn"
    rows.append(
        [
            "training smoke test",
            f"{verdict}: loss {smoke['first_loss']:.2f} -> {smoke['last_loss']:.2f} in {smoke['steps']} steps, "
            f"{smoke['tokens_per_second']:,.0f} tokens/s",
        ]
    )
    show("nanochat doctor", ["what", "found"], rows)
    return 0 if learns else 1
