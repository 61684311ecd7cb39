"""`nanochat bench optim`: state bytes, step time and peak memory of every optimizer at the shapes of the presets.

All layers of a preset have the same shapes, so that one layer's matrices and the tables are built and measured, each
part by itself, and the layer's figures are multiplied. Bytes are counted in state tensors after a real step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanochat.bench.measure import Parser, in_child, interleaved, peak_extra_bytes, report, show, some_of
from nanochat.config import CONF, compose
from nanochat.lightning.module import model_config
from nanochat.model import GPT
from nanochat.optim import Optimizer, build

PRESETS = ("test-8bit", "d20", "nano-125m", "d20-e3-full")
OPTIMIZERS = (
    "adamw",
    "adamw8bit",
    "lion",
    "lion8bit",
    "muon",
    "muon8bit",
    "galore",
    "galore8bit",
    "galore-muon8bit",
    "apollo",
)
TABLES = ("embedding", "tied_embedding", "head")


def names(group: str) -> list[str]:
    """The options of a group of the configuration that stand on their own."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml") if path.stem != "base")


class Shapes:
    """Parameters of a preset with random gradients: the tables, and one layer for all."""

    def __init__(self, preset: str) -> None:
        config = model_config(compose([f"model={preset}", "model.vocab_size=50257", "tokenizer.vocab_size=50257"]))
        self.layers = config.n_layers
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device).manual_seed(0)
        self.parameters: list[tuple[str, Tensor]] = []
        with torch.device("meta"):
            network = GPT(config)
        for name, like in network.named_parameters():
            if name.startswith("blocks.") and not name.startswith("blocks.0."):
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
        """How often the network has a parameter of this kind."""
        return self.layers if ".blocks." in parameter_name else 1

    def count(self, optimizer: Optimizer) -> dict[str, int]:
        """State bytes and parameters of the whole network, and of its hidden matrices alone."""
        totals = {"bytes": 0, "parameters": 0, "matrix_bytes": 0, "matrices": 0}
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                tensors = [v for v in optimizer.state[parameter].values() if isinstance(v, Tensor)]
                size = sum(t.numel() * t.element_size() for t in tensors) * self.times(name)
                number = parameter.numel() * self.times(name)
                totals["bytes"] += size
                totals["parameters"] += number
                if group["name"] == "matrices":
                    totals["matrix_bytes"] += size
                    totals["matrices"] += number
        return totals


def _move(optimizer: Optimizer, tables: bool) -> None:
    for group in optimizer.param_groups:
        if (group["name"] in TABLES) == tables and optimizer.gradients_fit(group):
            optimizer.step_group(group)


def _peak(preset: str, name: str) -> int:
    """Bytes above parameters, gradients and state at the peak of a step."""
    optimizer = Shapes(preset).optimizer(name)
    optimizer.step()
    return peak_extra_bytes(optimizer.step)


def _measure(preset: str, names: list[str], repeats: int) -> dict[str, Any]:
    shapes = Shapes(preset)
    optimizers = {name: shapes.optimizer(name) for name in names}
    for optimizer in optimizers.values():
        optimizer.step()  # states, and the first projectors
    arms = {}
    for name, optimizer in optimizers.items():
        arms[name, "tables"] = lambda o=optimizer: _move(o, tables=True)
        arms[name, "layer"] = lambda o=optimizer: _move(o, tables=False)
    seconds = interleaved(arms, repeats)  # type: ignore[arg-type]
    figures = {}
    for name, optimizer in optimizers.items():
        layer = seconds[name, "layer"]  # type: ignore[index]
        layer += _refresh_share(optimizer, layer, arms[name, "layer"])
        totals = shapes.count(optimizer)
        figures[name] = {
            "bytes_per_parameter": totals["bytes"] / totals["parameters"],
            "matrix_bytes_per_parameter": totals["matrix_bytes"] / totals["matrices"],
            "seconds": seconds[name, "tables"] + shapes.layers * layer,  # type: ignore[index]
            "matrix_seconds": shapes.layers * layer,
        }
    return {"parameters": totals["parameters"], "matrices": totals["matrices"], "optimizers": figures}


def _refresh_share(optimizer: Optimizer, ordinary: float, arm: Any) -> float:
    """Seconds that refreshing the layer's projectors adds to an average step."""
    groups = [g for g in optimizer.param_groups if str(g["rule"]).startswith("galore")]
    periods = [g["update_period"] for g in groups]
    if not groups:
        return 0.0
    for group in groups:
        group["update_period"] = 1
    always = interleaved({"refresh": arm}, 2)["refresh"]
    for group, period in zip(groups, periods, strict=True):
        group["update_period"] = period
    return max(0.0, always - ordinary) / periods[0]


def run(
    json: bool = False,
    presets: tuple[str, ...] = PRESETS,
    optimizers: tuple[str, ...] = OPTIMIZERS,
    repeats: int = 3,
    peak: bool = True,
) -> dict[str, Any]:
    """Measure and print one table; returns its figures.

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
            entry["to_adamw"] = entry["seconds"] / model["optimizers"]["adamw"]["seconds"]
            entry["to_muon"] = entry["seconds"] / model["optimizers"]["muon"]["seconds"]
            muon = model["optimizers"]["muon"]["matrix_seconds"]
            entry["matrices_to_muon"] = entry["matrix_seconds"] / muon
            cells = [entry[k] for k in ("bytes_per_parameter", "matrix_bytes_per_parameter")]
            row = [preset, name, *(f"{cell:.3f}" for cell in cells), entry["seconds"]]
            row += [f"{entry['to_adamw']:.2f}", f"{entry['to_muon']:.2f}", f"{entry['matrices_to_muon']:.3f}"]
            if peak:
                entry["peak_extra_mb"] = in_child(_peak, preset, name) / 1e6
                row.append(f"{entry['peak_extra_mb']:.0f}")
            rows.append(row)
    if not json:
        columns = ["model", "optim", "bytes/param", "matrices", "step s", "/ adamw", "/ muon", "matrices / muon"]
        notes = ["step s: all layers, projectors' refreshes shared out; peak: of a step on one layer and the tables."]
        show("Optimizers", columns + (["peak extra MB"] if peak else []), rows, notes)
    report(figures, json)
    return figures


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit code."""
    parser = Parser("bench optim", __doc__, repeats=3)
    presets, optimizers = (some_of(names(group)) for group in ("model", "optim"))
    words = "with commas between them ({})"
    parser.add_argument("--presets", type=presets, default=PRESETS, help=words.format(",".join(PRESETS)))
    parser.add_argument("--optim", type=optimizers, default=OPTIMIZERS, help=words.format("all"))
    parser.add_argument("--no-peak", action="store_true", help="leave out peak memory, which starts a process an arm")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    run(options.json, tuple(options.presets), tuple(options.optim), options.repeats, not options.no_peak)
    return 0
