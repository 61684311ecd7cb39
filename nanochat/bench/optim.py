"""`nanochat bench optim`: state bytes, step time and peak memory of every optimizer at the shapes of the presets.

On a CPU, which updates matrix after matrix, one layer stands for all: it and the tables are built, each part is timed
by itself, and the layer's figures are multiplied. On a GPU, which updates all matrices of a shape at once, the whole
network is built. Bytes are counted in state tensors after a real step. The optimizers of a preset take turns, so that
drift of the machine hits all alike; they share parameters and gradients, and hold their states together: about 45 bytes
for each parameter that is built (d20-e3-full on a CPU: 86M parameters, 5 GB in all).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanochat.bench.measure import (
    in_child,
    interleaved,
    measures_memory,
    network,
    options_of,
    paired_ratio,
    peak_extra_bytes,
    presets,
    report,
    rounds,
    seconds,
)
from nanochat.config.compose import compose
from nanochat.console import Parser, some_of
from nanochat.device import find_device
from nanochat.model import GPT
from nanochat.optim import Optimizer, build
from nanochat.optim.build import TABLES
from nanochat.optim.optimizer import tensor_bytes
from nanochat.optim.rules.galore import GaLore
from nanochat.reports.table import show

PRESETS = ("test-8bit", "d20", "nano-125m", "d20-e3-full")
OPTIMIZERS = tuple(options_of("optim"))


class Shapes:
    """Parameters of a preset with random gradients.

    whole: all layers; else one that stands for all. None: what suits the device.
    """

    def __init__(self, preset: str, whole: bool | None = None) -> None:
        config, device = network(preset), find_device()
        self.whole = device.type == "cuda" if whole is None else whole
        self.copies = 1 if self.whole else config.n_layers
        generator = torch.Generator(device).manual_seed(0)
        self.parameters: list[tuple[str, Tensor]] = []
        with torch.device("meta"):
            gpt = GPT(config)
        for name, like in gpt.named_parameters():
            if name.startswith("blocks.") and not name.startswith("blocks.0.") and not self.whole:
                continue
            parameter = torch.randn(like.shape, device=device, generator=generator).mul_(0.02).requires_grad_()
            parameter.grad = torch.randn(like.shape, device=device, generator=generator).mul_(1e-3)
            self.parameters.append((f"gpt.{name}", parameter))

    def optimizer(self, name: str) -> Optimizer:
        """conf/optim/NAME.yaml over these parameters."""
        node = compose([f"optim={name}"])["optim"]
        optimizer = build(self.parameters, **{k: v for k, v in node.items() if not k.startswith("_")})
        optimizer.set_progress(500, 1000, lambda step, max_steps: 1e-3)
        return optimizer

    def times(self, parameter_name: str) -> int:
        """How many parameters of the network this one stands for."""
        return self.copies if ".blocks." in parameter_name else 1

    def count(self, optimizer: Optimizer) -> dict[str, int]:
        """State bytes and parameters of the whole network, and of its hidden matrices alone."""
        totals = {"bytes": 0, "parameters": 0, "matrix_bytes": 0, "matrices": 0}
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                size = tensor_bytes(optimizer.state[parameter]) * self.times(name)
                number = parameter.numel() * self.times(name)
                totals["bytes"] += size
                totals["parameters"] += number
                if group["name"] == "matrices":
                    totals["matrix_bytes"] += size
                    totals["matrices"] += number
        return totals


def _step(optimizer: Optimizer, tables: bool) -> None:
    """A step of the embedding and the lm_head alone, or of all other groups."""
    groups = [group for group in optimizer.param_groups if (group["name"] in TABLES) == tables]
    if optimizer.gradients_fit(groups):
        for group in groups:
            optimizer.step_group(group)


def _peak(preset: str, name: str) -> int:
    """Bytes above parameters, gradients and state at the peak of a step, of one that refreshes its projectors."""
    optimizer = Shapes(preset).optimizer(name)
    optimizer.step()
    with every_step_refreshes(optimizer):
        return peak_extra_bytes(optimizer.step)


def _measure(preset: str, names: list[str], repeats: int) -> dict[str, Any]:
    shapes = Shapes(preset)
    optimizers = {name: shapes.optimizer(name) for name in names}
    for optimizer in optimizers.values():
        optimizer.step()  # states, and the first projectors
    arms = {}
    for name, optimizer in optimizers.items():
        arms[name, "tables"] = partial(seconds, partial(_step, optimizer, tables=True))
        arms[name, "layer"] = partial(seconds, partial(_step, optimizer, tables=False))
    taken = rounds(arms, repeats, say=True)
    times: dict[str, list[float]] = {}  # of the whole network, in each round
    matrices: dict[str, list[float]] = {}
    for name, optimizer in optimizers.items():
        layers = taken[name, "layer"]
        extra = _refresh_share(optimizer, statistics.median(layers), partial(_step, optimizer, tables=False))
        matrices[name] = [shapes.copies * (layer + extra) for layer in layers]
        times[name] = [tables + layer for tables, layer in zip(taken[name, "tables"], matrices[name], strict=True)]
    figures = {}
    for name, optimizer in optimizers.items():
        totals = shapes.count(optimizer)
        figures[name] = {
            "bytes_per_parameter": totals["bytes"] / totals["parameters"],
            "matrix_bytes_per_parameter": totals["matrix_bytes"] / totals["matrices"],
            "seconds": statistics.median(times[name]),
            "to_adamw": paired_ratio(times[name], times["adamw"]),
            "to_muon": paired_ratio(times[name], times["muon"]),
            "matrices_to_muon": paired_ratio(matrices[name], matrices["muon"]),
        }
    return {"parameters": totals["parameters"], "matrices": totals["matrices"], "optimizers": figures}


def _refresh_share(optimizer: Optimizer, ordinary: float, arm: Any) -> float:
    """Seconds that refreshing the projectors adds to an average step."""
    with every_step_refreshes(optimizer) as periods:
        if not periods:
            return 0.0
        always = interleaved({"refresh": arm}, 2)["refresh"]
    return max(0.0, always - ordinary) / periods[0]


@contextmanager
def every_step_refreshes(optimizer: Optimizer) -> Iterator[list[int]]:
    """Let GaLore's rules make their projectors anew at every step; yields the periods that they had."""
    groups = [group for group in optimizer.param_groups if isinstance(optimizer.rules[group["rule"]], GaLore)]
    periods = [group["update_period"] for group in groups]
    for group in groups:
        group["update_period"] = 1
    try:
        yield periods
    finally:
        for group, period in zip(groups, periods, strict=True):
            group["update_period"] = period


def run(
    json: bool = False,
    presets: tuple[str, ...] = PRESETS,
    optimizers: tuple[str, ...] = OPTIMIZERS,
    repeats: int = 3,
    peak: bool = True,
) -> dict[str, Any]:
    """Measure and print one table; returns its figures. AdamW and Muon, which the ratios are to, are always in it.

    Args:
        json: print JSON instead. presets, optimizers: names of `model=` and `optim=`.
        repeats: rounds, of which the median counts. peak: measure peak memory too, each arm in a process of its own.
    """
    arms = list(dict.fromkeys(("adamw", "muon", *optimizers)))
    figures: dict[str, Any] = {"models": {}}
    rows = []
    for preset in presets:
        model = _measure(preset, arms, repeats)
        figures["models"][preset] = model
        for name, entry in model["optimizers"].items():
            cells = [entry[k] for k in ("bytes_per_parameter", "matrix_bytes_per_parameter")]
            row = [preset, name, *(f"{cell:.3f}" for cell in cells), entry["seconds"]]
            row += [f"{entry['to_adamw']:.2f}", f"{entry['to_muon']:.2f}", f"{entry['matrices_to_muon']:.3f}"]
            if peak:
                entry["peak_extra_mb"] = in_child(_peak, preset, name) / 1e6
                row.append(f"{entry['peak_extra_mb']:.0f}")
            rows.append(row)
    if not json:
        columns = ["model", "optim", "bytes/param", "of matrices", "step s", "/ adamw", "/ muon", "matrices / muon"]
        notes = [
            "bytes/param: of the state, all parameters and the hidden matrices alone; adamw is torch's fused one. "
            "step s: of the whole network, projectors' refreshes shared out over their period."
        ]
        if not torch.cuda.is_available():
            notes.append("One layer was timed for all, with its norms, and the tables by themselves.")
        if peak:
            notes.append("peak: above weights, gradients and states, in a step that refreshes its projectors.")
        show("Optimizers", columns + (["peak extra MB"] if peak else []), rows, notes)
    report(figures, json)
    return figures


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit code."""
    parser = Parser("bench optim", __doc__, repeats=3)
    words = "with commas between them ({})"
    parser.add_argument("--presets", type=some_of(presets()), default=PRESETS, help=words.format(",".join(PRESETS)))
    parser.add_argument("--optim", type=some_of(options_of("optim")), default=OPTIMIZERS, help=words.format("all"))
    parser.add_argument("--no-peak", action="store_true", help="leave out peak memory, which starts a process an arm")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    peak = measures_memory() and not options.no_peak
    run(options.json, tuple(options.presets), tuple(options.optim), options.repeats, peak)
    return 0
