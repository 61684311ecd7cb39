"""`nanochat bench loss`: the chunked head and loss against the dense one, in time and peak memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from nanochat.bench.measure import in_child, interleaved, peak_extra_bytes, report
from nanochat.console import Parser, count
from nanochat.device import find_device
from nanochat.objectives import linear_cross_entropy
from nanochat.reports.table import show


def _inputs(tokens: int, dim: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    device = find_device()
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(1, tokens, dim, device=device, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, dim, device=device, generator=generator).mul_(0.02).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (1, tokens), device=device, generator=generator)


def dense(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    """Forward and backward with the logits whole."""
    F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), targets.flatten()).backward()
    hidden.grad = weight.grad = None


def chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    """Forward and backward a chunk at a time."""
    linear_cross_entropy(hidden, weight, targets).loss.backward()
    hidden.grad = weight.grad = None


def torch_chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    """torch's own (2.13 or newer), with the same explicit chunk."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)  # type: ignore[attr-defined]
    loss = F.linear_cross_entropy(hidden[0], weight, targets[0], options=options)  # type: ignore[attr-defined]
    loss.backward()
    hidden.grad = weight.grad = None


ARMS = {"dense": dense, "chunked": chunked}
if hasattr(F, "linear_cross_entropy"):
    ARMS["torch, chunks of 256"] = torch_chunked


def _peak(arm: str, tokens: int, dim: int, vocabulary: int) -> int:
    inputs = _inputs(tokens, dim, vocabulary)
    small = _inputs(8, dim, 512)
    ARMS[arm](*small)  # libraries allocate on their first call
    return peak_extra_bytes(lambda: ARMS[arm](*inputs))


def _times(shape: tuple[int, int, int], repeats: int) -> dict[str, float]:
    inputs = _inputs(*shape)
    return interleaved({name: lambda f=f: f(*inputs) for name, f in ARMS.items()}, repeats)


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit code."""
    parser = Parser("bench loss", __doc__, repeats=3)
    parser.add_argument("--tokens", type=count, default=8192)
    parser.add_argument("--dim", type=count, default=256)
    parser.add_argument("--vocabulary", type=count, default=50257)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    shape = (options.tokens, options.dim, options.vocabulary)
    times = _times(shape, options.repeats)
    peaks = {name: in_child(_peak, name, *shape) for name in ARMS}
    figures: dict[str, Any] = {"tokens": shape[0], "dim": shape[1], "vocabulary": shape[2], "arms": {}}
    rows = []
    for name in ARMS:
        entry = {
            "seconds": times[name],
            "peak_extra_mb": peaks[name] / 1e6,
            "time_ratio": times[name] / times["dense"],
            "memory_ratio": peaks[name] / peaks["dense"],
        }
        figures["arms"][name] = entry
        rows.append([name, *entry.values()])
    figures["time_ratio"] = figures["arms"]["chunked"]["time_ratio"]
    figures["memory_ratio"] = figures["arms"]["chunked"]["memory_ratio"]
    if not options.json:
        title = f"Head + loss, forward and backward: {shape[0]:,} tokens x {shape[1]} x {shape[2]:,} words"
        show(title, ["", "seconds", "peak extra MB", "time / dense", "memory / dense"], rows)
    report(figures, options.json)
    return 0
