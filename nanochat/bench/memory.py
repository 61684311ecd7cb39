"""`nanochat bench memory`: what training is predicted to take in memory, beside what it takes.

Each configuration trains for some optimizer steps in a fresh process. Measured is the peak of the steps after the
first, above what the process held before the network was built: resident memory on a CPU, the allocator's counter on
CUDA. On a CPU, freed memory goes back to the system at once here, which glibc by itself does only now and then.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch

from nanochat.bench.measure import in_child, options_of, peak_resident_bytes, report, reset_peak, resident_bytes
from nanochat.config.compose import compose
from nanochat.config.vocabulary import plan_vocabulary
from nanochat.console import Parser, count
from nanochat.device import find_device
from nanochat.reports.table import show
from nanochat.run import settle
from nanochat.training.ledger import Ledger
from nanochat.training.memory import Rehearsal, predict

CONFIGURATIONS = {
    "tiny": ["experiment=tiny"],
    "tiny, MTP": ["experiment=tiny", "+mtp=on", "data.batch_size=16"],
    "d20": ["experiment=d20", "data.batch_size=8"],
    "d20, Collider, Muon 8-bit": ["experiment=d20", "data.batch_size=8", "optim=muon8bit", "+collider=on"],
    "d20, recomputed": ["experiment=d20", "data.batch_size=16", "activation_checkpointing=block"],
    "tiny, bfloat16 weights": ["experiment=tiny", "data.batch_size=8", "weights=bfloat16"],
    "tiny, bfloat16 weights and copies": ["experiment=tiny", "data.batch_size=8", "weights=bfloat16-master"],
    "d20, bfloat16 weights": ["experiment=d20", "data.batch_size=2", "weights=bfloat16"],
    "d20, bfloat16 weights and copies": ["experiment=d20", "data.batch_size=2", "weights=bfloat16-master"],
    "tiny, bf16-mixed": ["experiment=tiny", "data.batch_size=16", "trainer.precision=bf16-mixed"],
    "test-8bit": ["experiment=test-8bit"],
    "nano-125m": ["experiment=nano-125m", "data.batch_size=1", "trainer.accumulate_grad_batches=2"],
    "nano-125m, recomputed": [
        "experiment=nano-125m", "data.batch_size=2", "trainer.accumulate_grad_batches=1",
        "activation_checkpointing=block",
    ],
}  # fmt: skip
COLUMNS = {
    "32-true": [],
    "32-true, block": ["activation_checkpointing=block"],
    "bf16-mixed": ["trainer.precision=bf16-mixed"],
    "bf16-mixed, block": ["trainer.precision=bf16-mixed", "activation_checkpointing=block"],
    "bf16-mixed, block, batch 1": [
        "trainer.precision=bf16-mixed", "activation_checkpointing=block", "data.batch_size=1",
    ],
}  # fmt: skip
"""the switches of `--table`"""
HEADINGS = ["experiment", "batch x tokens", "weights + state", *COLUMNS]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
RETURNED = 2**16
"""bytes from which an allocation is a mapping of its own, which goes back when it is freed"""


def configure(overrides: list[str]) -> dict[str, Any]:
    """A settled configuration whose vocabulary is a number."""
    return plan_vocabulary(settle(compose(overrides)))


def measure(cfg: dict[str, Any], steps: int) -> int:
    """Bytes that some steps take at their peak, the first left out if there are more; for a fresh process."""
    device = find_device(cfg["trainer"]["accelerator"])
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, RETURNED)
        libc.mallopt(M_TRIM_THRESHOLD, RETURNED)
    x = torch.ones(64, 64, device=device, requires_grad=True)
    (x @ x).sum().backward()  # libraries load
    before = resident_bytes()
    run = Rehearsal(cfg, device, Ledger())

    def step() -> None:
        for _ in range(run.accumulate):
            run.micro_batch()
        run.update()

    step()
    if steps > 1:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            reset_peak()
        for _ in range(steps - 1):
            step()
        if run.sparsity:  # as a run's first steps, which see all tokens
            run.filter_tokens(0.0)
            step()
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_resident_bytes() - before


def row(experiment: str) -> list[str]:
    """A recipe's line of the table: its batch, what always stays, and the peak with each of the switches, in GiB."""
    cells: list[str] = []
    update = 0
    for overrides in COLUMNS.values():
        cfg = configure([f"experiment={experiment}", "trainer=cpu", "trainer.precision=32-true", *overrides])
        memory = predict(cfg, update=not cells)
        if not cells:
            update = memory.others["optimizer"]
            batch = f"{cfg['data']['batch_size']} x {cfg['data']['seq_len']:,}"
            cells = [experiment, batch, f"{memory.fixed / 2**30:.2f}"]
        cells.append(f"{max(memory.peak, update) / 2**30:.2f}")
    return cells


def line(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit code."""
    parser = Parser("bench memory", __doc__)
    parser.add_argument("--only", choices=list(CONFIGURATIONS), help="one of the configurations")
    parser.add_argument("overrides", nargs="*", help="a configuration of your own in place of ours")
    parser.add_argument(
        "--steps", type=count, default=3, help="that are trained; of several the first does not count (3)"
    )
    parser.add_argument("--table", action="store_true", help="predict only: the table of docs/memory.md, as Markdown")
    options = parser.parse_intermixed_args(argv)
    if options.table:
        for cells in (HEADINGS, ["---"] * len(HEADINGS)):
            print(line(cells))
        for experiment in options_of("experiment"):
            print(line(row(experiment)), flush=True)
        return 0
    chosen = {"yours": options.overrides} if options.overrides else CONFIGURATIONS
    if options.only:
        chosen = {options.only: CONFIGURATIONS[options.only]}
    figures: dict[str, Any] = {}
    for name, overrides in chosen.items():
        cfg = configure(overrides)
        memory = predict(cfg)
        measured = in_child(measure, cfg, options.steps)
        print(f"{name}: {memory.peak / 2**20:,.0f} MiB predicted, {measured / 2**20:,.0f} measured", file=sys.stderr)
        figures[name] = {
            "predicted": memory.peak,
            "measured": measured,
            "ratio": memory.peak / measured,
            "moment": memory.moment,
            "parts": memory.parts,
        }
    if options.json:
        report({"configurations": figures}, as_json=True)
        return 0
    rows = [
        [name, f"{one['predicted'] / 2**20:,.0f}", f"{one['measured'] / 2**20:,.0f}", f"{one['ratio']:.3f}"]
        for name, one in figures.items()
    ]
    headings = ["configuration", "predicted MiB", "measured MiB", "predicted / measured"]
    show("Peak memory of training", headings, rows, ["Without Python and torch themselves."])
    return 0
