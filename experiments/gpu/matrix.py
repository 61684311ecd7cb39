"""Steps of every preset, eager and compiled, in every arithmetic, and with every optimizer: `matrix.py OUT.json`.

Each preset and mode has a process of its own; a cell that fails or takes too long costs that process at most, is a row
with its reason, and makes the exit code 1. TINY=1 takes a network that any machine trains in no time.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PRESETS = {"nano-1b": (8, 1), "nano-125m": (32, 1), "d20": (64, 1), "d20-e3-full": (8, 1), "tiny": (128, 1)}
"""preset: sequences of a micro-batch, micro-batches of a step; the first are the last to be left without time"""
PLAIN = "plain GPT"
ARITHMETIC = {
    PLAIN: None,
    "float": ["model.ternary=false"],
    "ternary": ["model.int8=false"],
    "ternary int8": ["model.int8=true", "model.weight_block=row"],
}
"""arithmetic: overrides; the plain GPT is none of ours"""
OPTIMIZER_PRESET = "nano-125m"
"""the preset on which all optimizers are measured, eager: their part of a step is not compiled; the others have muon"""
TINY = [
    "model.n_layers=1", "model.dim=64", "model.n_heads=2", "model.n_kv_heads=2", "model.ffn_dim=128",
    "model.vocab_size=512", "model.seq_len=32",
]  # fmt: skip
WARM_UP, LEAST, MOST, SECONDS = 3, 5, 50, 1.0
"""steps before the clock starts; at least and at most so many measured ones, of so many seconds together"""
TINY_STEPS = 2
"""measured steps of TINY=1, after one"""


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    preset: str
    compiled: bool
    arithmetic: str
    optimizer: str
    batch: int
    accumulate: int
    tiny: bool = False


def groups(tiny: bool) -> Iterator[list[Cell]]:
    """The cells that share a process."""
    from nanochat.config.schema import CONF  # and nothing that imports torch: each process of a group does

    others = sorted(path.stem for path in (CONF / "optim").glob("*.yaml") if path.stem != "muon")
    if tiny:
        cells = [Cell("tiny", False, a, "adamw" if a == PLAIN else "muon", 2, 2, True) for a in ARITHMETIC]
        yield cells + [Cell("tiny", False, "ternary", name, 2, 2, True) for name in others]
        return
    for compiled in (False, True):
        for preset, shape in PRESETS.items():
            cells = [Cell(preset, compiled, a, "adamw" if a == PLAIN else "muon", *shape) for a in ARITHMETIC]
            if preset == OPTIMIZER_PRESET and not compiled:
                cells += [Cell(preset, compiled, "ternary", name, *shape) for name in others]
            yield cells


# ---- in the process of a group ------------------------------------------------------------------------------------


def measure(cell: Cell) -> dict[str, Any]:
    """The figures of a cell."""
    import torch
    from plain_gpt import PlainGPT, plain_step

    from nanochat.bench.step import bare_step, build, configure
    from nanochat.data.random_tokens import RandomTokens
    from nanochat.device import find_device
    from nanochat.model.bitlinear import keep_trits
    from nanochat.training.callbacks.throughput import flops_per_token, peak_flops
    from nanochat.training.module import model_config

    overrides = [f"compile={str(cell.compiled).lower()}", *(TINY if cell.tiny else [])]
    cfg = configure(
        cell.preset, cell.optimizer, [*overrides, *(ARITHMETIC[cell.arithmetic] or ["model.ternary=false"])]
    )
    device, config = find_device(cfg["trainer"]["accelerator"]), model_config(cfg)
    data = RandomTokens(config, cell.batch, cell.accumulate, device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    bf16 = cfg["trainer"]["precision"] != "32-true"
    if cell.arithmetic == PLAIN:
        network = PlainGPT(config).to(device)
        model = torch.compile(network) if cell.compiled else network
        plain = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)

        def step() -> None:
            plain_step(model, plain, data.batches, bf16)  # type: ignore[arg-type]

    else:
        module = build(cfg)
        keep_trits(module, cell.accumulate > 1)
        network, optimizer = module.gpt, module.configure_optimizers()

        def step() -> None:
            bare_step(module, optimizer, data.batches)

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(1 if cell.tiny else WARM_UP):
        step()
    least, most = (TINY_STEPS, TINY_STEPS) if cell.tiny else (LEAST, MOST)
    start, done = clock(), 0
    while done < least or (done < most and time.perf_counter() - start < SECONDS):
        step()
        done += 1
    taken = (clock() - start) / done
    tokens = cell.batch * cell.accumulate * config.seq_len
    peak = peak_flops(torch.cuda.get_device_name()) if cuda and bf16 else None
    return {
        "tokens_per_step": tokens,
        "step_seconds": taken,
        "tokens_per_second": tokens / taken,
        "mfu": None if peak is None else tokens / taken * flops_per_token(network) / peak,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "precision": cfg["trainer"]["precision"],
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": str(torch.__version__),
    }


def work(cells: list[Cell], limit: int) -> None:
    """Measure the cells one after the other, a line of JSON each. A cell beyond its limit ends the process."""
    import gc

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for cell in cells:
        signal.alarm(limit)  # without a handler: no kernel and no compiler can hold it up
        try:
            answer = measure(cell)
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
        signal.alarm(0)
        print(json.dumps(answer), file=answers, flush=True)
        gc.collect()
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
            sys.modules["torch"].cuda.empty_cache()


# ---- the whole ----------------------------------------------------------------------------------------------------


def run_group(cells: list[Cell], limit: int, deadline: float) -> list[dict[str, Any]]:
    """A row for every cell: the cell, with its figures or an `error`. A process that dies is replaced by another."""
    rows: list[dict[str, Any]] = []
    while len(rows) < len(cells):
        left = cells[len(rows) :]
        time_left = deadline - time.monotonic()
        if time_left < 1:
            return rows + [{**asdict(cell), "error": "no time was left"} for cell in left]
        argument = json.dumps([asdict(cell) for cell in left])
        command = [sys.executable, __file__, "--work", argument, "--limit", str(limit)]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            try:
                out, _ = process.communicate(timeout=time_left)
                reason = f"took longer than {limit} s" if process.returncode == -signal.SIGALRM else None
            except subprocess.TimeoutExpired:
                process.kill()
                out, _ = process.communicate()
                reason = "no time was left"
            errors.seek(0)
            last = ([line.strip() for line in errors.read().splitlines() if line.strip()] or [""])[-1]
        answers = [json.loads(line) for line in out.splitlines()]
        rows += [{**asdict(cell), **answer} for cell, answer in zip(left, answers, strict=False)]
        if len(answers) < len(left):
            reason = reason or f"its process ended with {process.returncode}: {last[:200]}"
            rows.append({**asdict(left[len(answers)]), "error": reason})
    return rows


def main() -> int:
    """Measure everything and write the rows; 1 when a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--limit", type=int, default=75, help="seconds of a cell, with what it compiles")
    parser.add_argument("--seconds", type=float, default=330, help="seconds of all cells")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work([Cell(**fields) for fields in json.loads(options.work)], options.limit)
        return 0
    if options.out is None:
        parser.error("name the file of the figures")
    deadline, rows = time.monotonic() + options.seconds, []
    for cells in groups(tiny=bool(os.environ.get("TINY"))):
        rows += run_group(cells, options.limit, deadline)
        options.out.write_text(json.dumps(rows, indent=1))  # what there is, should we be stopped
    failed = sum("error" in row for row in rows)
    print(f"matrix: {len(rows) - failed} of {len(rows)} cells", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
