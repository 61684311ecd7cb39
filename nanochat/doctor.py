"""`nanochat doctor`: what this machine has, what will work on it, and a few seconds of real training as the proof."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer

from nanochat.config.compose import compose
from nanochat.console import Parser, seconds
from nanochat.data.random_tokens import RandomTokens
from nanochat.device import find_device, has_int8_products, matmul_dtype, product_speeds
from nanochat.reports.table import show
from nanochat.run import build_trainer, quieten, settle
from nanochat.training.callbacks.base import StepCallback
from nanochat.training.module import NanoChatModule, model_config

PACKAGES = ("nanochat", "torch", "lightning", "hydra-core", "tokenizers", "numpy")
EXTRAS = {
    "gguf": "export to GGUF",
    "safetensors": "export to safetensors",
    "wandb": "logger=wandb",
    "tensorboard": "logger=tensorboard",
    "mlflow-skinny": "logger=mlflow",
    "bitsandbytes": "8-bit optimizer kernels on CUDA",
}
SMOKE_SECONDS = 5.0
LEAST = 20
"""steps of the smoke test on however slow a machine"""
SEQUENCES = 8


def versions() -> dict[str, str]:
    """Package -> version, or `missing`."""
    found = {}
    for package in (*PACKAGES, *EXTRAS):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def device(plain: dict[str, Any]) -> str:
    """The device and the precision of a run, in words."""
    where = find_device(plain["trainer"]["accelerator"])
    name = where.type
    if where.type == "cuda":
        properties = torch.cuda.get_device_properties(where)
        name = f"cuda: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    elif where.type == "cpu":
        name = f"cpu: {torch.get_num_threads()} threads"
    return f"{name}, {plain['trainer']['precision']}{', compiled' if plain['compile'] else ''}"


def products() -> dict[str, Any]:
    """What the probe of `nanochat.device` finds: Gop/s of matrix products by dtype (on a CPU), and what a run makes of
    it: whether `precision=auto` computes in bfloat16, and whether int8 products are used."""
    where = find_device()
    return {
        "gops": {name: round(speed, 1) for name, speed in product_speeds(where).items()} if where.type == "cpu" else {},
        "bfloat16": matmul_dtype(where) == torch.bfloat16,
        "int8": has_int8_products(where),
    }


def products_in_words(found: dict[str, Any]) -> str:
    """`products()` in one line."""
    speeds = "".join(f"{name} {speed:,.0f} Gop/s, " for name, speed in found["gops"].items())
    used = (f"{name} is {'' if found[name] else 'not '}used" for name in ("bfloat16", "int8"))
    return speeds + ", ".join(used)


def compiler() -> str:
    """Whether `compile=true` can work."""
    if find_device().type == "cuda":
        return "yes" if importlib.util.find_spec("triton") else "no: triton is missing"
    return (
        "yes (slow to start, gains little on a CPU)"
        if shutil.which("g++") or shutil.which("clang++")
        else "no: no C++ compiler"
    )


def smoke_config() -> dict[str, Any]:
    """The settled configuration of a small ternary model on whatever a run takes here: device, precision, compilation
    and optimizer are a run's defaults."""
    words = ["model.dim=128", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=4", "model.ffn_dim=256",
             "model.seq_len=64", "model.vocab_size=512", "tokenizer=byte", "schedule=constant",
             "schedule.warmup_steps=0", "callbacks=none", "logger=none", "trainer.max_steps=1000000",
             "trainer.limit_val_batches=0"]  # fmt: skip
    return settle(compose(words))


class _Watch(StepCallback):
    """Notes the losses, and stops once `budget` seconds have passed since the first step, but not before LEAST."""

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.losses: list[float] = []
        self.first = self.last = 0.0

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        self.losses.append(pl_module.step_metrics["train/loss"])  # type: ignore[index]
        self.last = time.perf_counter()
        if step == 1:  # compilation and the first allocations are not what training costs
            self.first = self.last
        elif step >= LEAST and self.last - self.first >= self.budget:
            trainer.should_stop = True


def smoke_test(plain: dict[str, Any], budget: float = SMOKE_SECONDS) -> dict[str, float]:
    """Train on one repeated batch as a run does, by the LightningModule and the Trainer; its loss must fall.

    Args:
        plain: a settled configuration. budget: seconds of training after the first step.

    Returns:
        first_loss and last_loss in nats, steps, first_step_seconds (building and compiling included), and
        tokens_per_second after it.
    """
    quieten()
    config, watch, start = model_config(plain), _Watch(budget), time.perf_counter()
    data = RandomTokens(config, SEQUENCES, 1, find_device(plain["trainer"]["accelerator"]))
    data.batches *= 1000  # an epoch
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = build_trainer(plain, Path(folder), [])
        trainer.callbacks.append(watch)  # type: ignore[attr-defined]
        trainer.fit(NanoChatModule(plain), datamodule=data)
    steps = len(watch.losses)
    return {
        "first_loss": watch.losses[0],
        "last_loss": watch.losses[-1],
        "steps": steps,
        "first_step_seconds": watch.first - start,
        "tokens_per_second": (steps - 1) * SEQUENCES * config.seq_len / (watch.last - watch.first),
    }


def verdict(smoke: dict[str, float]) -> str:
    """What a finished smoke test shows, in words."""
    return (
        f"{'learns' if learns(smoke) else 'does NOT learn'}: loss {smoke['first_loss']:.2f} -> "
        f"{smoke['last_loss']:.2f} in {smoke['steps']} steps, {smoke['tokens_per_second']:,.0f} tokens/s "
        f"(the first step took {smoke['first_step_seconds']:.1f} s)"
    )


def learns(smoke: dict[str, float]) -> bool:
    """Whether the loss fell by a tenth (NaN did not)."""
    return smoke["last_loss"] < 0.9 * smoke["first_loss"]


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
    """Print what was found; exit code 1 when the smoke test fails or does not learn."""
    parser = Parser("doctor", __doc__)
    parser.add_argument("--seconds", type=seconds, default=SMOKE_SECONDS, help="length of the training smoke test")
    options = parser.parse_args(argv)
    plain = smoke_config()
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": device(plain),
        "matrix products": products(),
        "compile": compiler(),
        "huge pages for torch": "on" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "off",
        "outputs/ can be written": _try(lambda: writable(Path("outputs").absolute())),
        "versions": versions(),
    }
    try:
        found["smoke test"] = smoke_test(plain, options.seconds)
        said, well = verdict(found["smoke test"]), learns(found["smoke test"])
    except Exception as error:  # whatever a run would die of here is what the doctor is asked for
        reason = (str(error).strip().splitlines() or [""])[0]
        said, well = f"FAILED: {type(error).__name__}: {reason}", False
        found["smoke test"] = {"error": said}
    if options.json:
        print(json.dumps({**found, "ok": well}, indent=2))
        return 0 if well else 1
    lines = {**found, "matrix products": products_in_words(found["matrix products"])}
    rows = [[key, value] for key, value in lines.items() if isinstance(value, str)]
    for package, version in found["versions"].items():
        hint = f"missing: needed for {EXTRAS[package]}" if version == "missing" and package in EXTRAS else version
        rows.append([package, hint])
    rows.append(["training smoke test", said])
    show("nanochat doctor", ["what", "found"], rows)
    return 0 if well else 1
