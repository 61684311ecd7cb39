"""`nanochat bench step`: training speed at the shapes of the presets, where the time goes, and Lightning's share.

With `--peer NAME=PATH`: our step as a run starts it beside those of other projects, with the rounds interleaved.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from torch import Tensor

from nanochat.bench.measure import clock, interleaved, report, seconds
from nanochat.bench.peers import OURS, Peer, add_peer_option, compare, current_load
from nanochat.config.compose import compose
from nanochat.config.vocabulary import plan_vocabulary
from nanochat.console import Parser, some_of
from nanochat.data.random_tokens import RandomTokens
from nanochat.device import autocast, find_device
from nanochat.errors import UserError
from nanochat.model.bitlinear import keep_trits
from nanochat.objectives import Step, linear_cross_entropy
from nanochat.reports.table import show
from nanochat.run import build_trainer, quieten, settle
from nanochat.training.module import NanoChatModule, model_config

# preset: sequences of a micro-batch, micro-batches of a step
SHAPES = {"tiny": (6, 1), "d20": (8, 4), "nano-125m": (1, 8)}
PRECISIONS = ("32-true", "bf16-mixed")
"""what a run takes by default, by Lightning's names"""
EVERY_STEP = ("guard", "throughput", "metrics")
"""the callbacks of conf/callbacks/default that do their work at every step"""


def configure(preset: str, optim: str, overrides: Sequence[str] = (), max_steps: int = 1000) -> dict[str, Any]:
    """The settled configuration of a preset as a user starts it, on the device that `auto` takes.

    Raises `UserError` for what a bench of steps cannot measure.
    """
    words = [f"model={preset}", f"optim={optim}", f"trainer.max_steps={max_steps}"]
    cfg = plan_vocabulary(settle(compose([*words, *overrides])))
    if (cfg.get("collider") or {}).get("_target_"):
        raise UserError("bench step trains on all tokens; +collider=on is measured by `nanochat bench collider`.")
    if cfg["trainer"]["precision"] not in PRECISIONS:
        known = " or ".join(PRECISIONS)
        raise UserError(f"trainer.precision={cfg['trainer']['precision']}: bench step measures {known}.")
    return cfg


def build(cfg: dict[str, Any]) -> NanoChatModule:
    """The module of a settled configuration on its device, compiled where a run compiles it."""
    module = NanoChatModule(cfg).to(find_device(cfg["trainer"]["accelerator"]))
    module.configure_model()
    return module


def precision(module: NanoChatModule) -> torch.autocast:
    """The precision in which the Trainer would run the forward pass."""
    return autocast(module.device, module.cfg["trainer"]["precision"])


def loss_of(module: NanoChatModule, batch: dict[str, Tensor]) -> Tensor:
    """Forward through the network, the head and all objectives, as a training step does."""
    with precision(module):
        step = Step.of(module.gpt, batch["tokens"], batch["targets"])
        return torch.stack([objective(step) for objective in module.objectives.values()]).sum()


def optimizer_step(module: NanoChatModule, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's part of a step, with the clipping before it."""
    if clip := module.cfg["trainer"].get("gradient_clip_val"):
        torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
    optimizer.set_progress(500, 1000, module.schedule)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()


def bare_step(module: NanoChatModule, optimizer: torch.optim.Optimizer, batches: list[dict[str, Tensor]]) -> None:
    """One optimizer step in a plain loop."""
    for batch in batches:
        (loss_of(module, batch) / len(batches)).backward()
    optimizer_step(module, optimizer)


def parts(module: NanoChatModule, batch: dict[str, Tensor]) -> dict[str, Callable[[], None]]:
    """Forward and backward of each part of the network alone, at the shapes of one micro-batch."""
    gpt, tokens = module.gpt, batch["tokens"]
    shape = (*tokens.shape, gpt.config.dim)
    x = torch.randn(shape, device=tokens.device, requires_grad=True)
    upstream = torch.randn(shape, device=tokens.device)
    cos, sin = gpt.cos[: shape[1]], gpt.sin[: shape[1]]
    block = gpt.blocks[0]

    def forward_backward(part: Callable[[], Tensor], times: int = 1) -> None:
        for _ in range(times):
            with precision(module):
                y = part()
            y.backward(upstream.to(y.dtype) if y.ndim else None)

    def embedding() -> None:
        forward_backward(lambda: gpt.embed(tokens))

    def attention() -> None:
        forward_backward(lambda: block.attention(x, cos, sin), len(gpt.blocks))  # type: ignore[operator]

    def feedforward() -> None:
        forward_backward(lambda: block.feedforward(x), len(gpt.blocks))  # type: ignore[operator]

    def head() -> None:
        forward_backward(lambda: linear_cross_entropy(gpt.norm(x), gpt.head_weight(), batch["targets"]).loss)

    return {"embedding": embedding, "attention": attention, "feed-forward": feedforward, "head + loss": head}


def bench_preset(cfg: dict[str, Any], batch: int, accumulate: int, repeats: int) -> dict[str, Any]:
    """Tokens per second of a whole step in a plain loop, and the share of each part in it.

    Args:
        cfg: as `configure` gives it. batch: sequences of a micro-batch. accumulate: micro-batches of a step.
    """
    module = build(cfg)
    keep_trits(module, accumulate > 1)  # as a run does
    config = module.gpt.config
    data = RandomTokens(config, batch, accumulate, module.device)
    optimizer = module.configure_optimizers()

    def data_part() -> None:
        for i in range(accumulate):
            data.source.batch(i)

    bare_step(module, optimizer, data.batches)
    whole, shares = [], {}
    for _ in range(repeats):
        whole.append(seconds(lambda: bare_step(module, optimizer, data.batches)))
    step = sorted(whole)[len(whole) // 2]
    for name, taken in interleaved(parts(module, data.batches[0]), repeats).items():
        shares[name] = accumulate * taken / step
    module.zero_grad()
    loss_of(module, data.batches[0]).backward()
    gradients = {p: p.grad.clone() for p in module.parameters() if p.grad is not None}

    def one_optimizer_step() -> None:
        for p, g in gradients.items():
            p.grad = g
        optimizer_step(module, optimizer)

    shares["optimizer"] = interleaved({"optimizer": one_optimizer_step}, repeats)["optimizer"] / step
    # what the prefetching thread does for a step: the whole cost, though a run waits for little of it
    shares["data"] = interleaved({"data": data_part}, repeats)["data"] / step
    tokens = batch * accumulate * config.seq_len
    return {"tokens_per_step": tokens, "step_seconds": step, "tokens_per_second": tokens / step, "share": shares}


def bench_peers(
    cfg: dict[str, Any], batch: int, accumulate: int, repeats: int, peers: Sequence[Peer], compiled: bool
) -> dict[str, Any]:
    """What `compare` gives for the step of a settled configuration, and `ours`: what was settled.

    Every arm trains on random tokens of the same shape, as many a step. Ours is the step of a run, with its clipping;
    the peers' are in their fastest of float32 and bfloat16, with their own optimizers and without clipping.
    """
    module = build(cfg)
    keep_trits(module, accumulate > 1)
    config = module.gpt.config
    data = RandomTokens(config, batch, accumulate, module.device)
    optimizer = module.configure_optimizers()
    load = current_load(config, batch, accumulate, module.device)
    parameters = sum(p.numel() for p in module.parameters())
    figures = compare(
        lambda: bare_step(module, optimizer, data.batches), parameters, peers, compiled, load, repeats
    )  # fmt: skip
    settled = {"precision": cfg["trainer"]["precision"], "compile": cfg["compile"], "int8": config.int8}
    return {"ours": {**settled, "ternary": config.ternary}, **figures}


PEERS_NOTE = (
    "The peers have their own optimizers and do not clip; karpathy's model has its own feed-forward and tables."
)


def show_peers(preset: str, optim: str, threads: int, figures: dict[str, Any]) -> None:
    """Print the comparison of one preset."""
    best = figures["best"].values()
    rows = [
        [
            name,
            f"{arm['parameters'] / 1e6:,.1f}M",
            f"{arm['tokens_per_second']:,.0f}",
            f"{arm['ours_over_this']:.2f}x",
            "yes" if name in best else "",
        ]
        for name, arm in figures["arms"].items()
    ]
    settled = ", ".join(f"{key}={value}" for key, value in figures["ours"].items())
    notes = [f"{OURS}: optim={optim}, {settled}. Ratios are medians over the rounds.", PEERS_NOTE]
    notes += [f"{name} did not run: {reason}" for name, reason in figures["failed"].items()]
    title = f"Training step, {preset}, {figures['tokens_per_step']:,} tokens a step, {threads} thread(s)"
    show(title, ["arm", "parameters", "tokens/s", "time of ours", "its best"], rows, notes)


class _Clock(Callback):
    """Reads the clock after each optimizer step."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if len(self.marks) < trainer.global_step:
            self.marks.append(clock())


def bench_lightning(cfg: dict[str, Any], batch: int, steps: int, rounds: int) -> dict[str, float]:
    """Seconds of an optimizer step under the Trainer over those of a plain loop: the framework's own cost.

    Both arms have the same network and objectives, the same batches ready on the device, the same precision,
    compilation and gradient clipping, one micro-batch a step, and a clock that is read after every step (which on a
    GPU waits for it). The Trainer's arm is built as a run is, and has besides what a run does at every step: the guard
    against non-finite gradients, the throughput and a row of metrics.csv. Not in it: the sampler, loss.png and the
    checkpoints, which do not come at every step, the progress bar, the signals, validation and the loading of data.

    Args:
        cfg: as `configure` gives it. batch: sequences of a step.
        steps: measured in each arm, after two that warm up. rounds: of both arms in turn; medians count.
    """
    cfg = copy.deepcopy(cfg)
    cfg["trainer"] |= {
        "max_steps": steps + 2, "max_time": None, "accumulate_grad_batches": 1, "limit_val_batches": 0,
        "enable_progress_bar": False,
    }  # fmt: skip
    cfg["callbacks"] = {name: node for name, node in (cfg.get("callbacks") or {}).items() if name in EVERY_STEP}
    device = find_device(cfg["trainer"]["accelerator"])
    data = RandomTokens(model_config(cfg), batch, steps + 2, device)

    def bare() -> float:
        module = build(cfg)
        optimizer, marks = module.configure_optimizers(), []
        for micro in data.batches:
            bare_step(module, optimizer, [micro])
            marks.append(clock())
        return (marks[-1] - marks[1]) / steps

    def trainer() -> float:
        marks = _Clock()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lightning_trainer = build_trainer(cfg, Path(folder), [])
            lightning_trainer.callbacks.append(marks)  # type: ignore[attr-defined]
            lightning_trainer.fit(NanoChatModule(cfg), datamodule=data)
        return (marks.marks[-1] - marks.marks[1]) / steps

    quieten()
    pairs = [(bare(), trainer()) for _ in range(rounds)]
    return {
        "bare_step_seconds": statistics.median(seconds for seconds, _ in pairs),
        "lightning_ratio": statistics.median(trainer / bare for bare, trainer in pairs),
    }


def check_overrides(words: list[str]) -> list[str]:
    """The configuration overrides of the command line; raises `UserError` for what is none."""
    for word in words:
        if "=" not in word and not word.startswith("~"):
            raise UserError(
                f"{word!r} is no override such as model.ternary=false; several presets have commas between them: "
                "--presets d20,nano-125m."
            )
        if word.split("=")[0] in ("model", "optim", "experiment"):
            raise UserError(f"{word}: bench step takes its networks by --presets and its optimizer by --optim.")
    return words


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit code."""
    parser = Parser("bench step", __doc__, repeats=3)
    presets = f"with commas between them, of {', '.join(SHAPES)} (d20,nano-125m)"
    parser.add_argument("--presets", type=some_of(SHAPES), default=["d20", "nano-125m"], help=presets)
    parser.add_argument("--optim", default="muon")
    parser.add_argument("--no-lightning", action="store_true", help="leave out the comparison with a bare loop")
    add_peer_option(parser)
    parser.add_argument("--compile", action="store_true", help="measure the peers compiled, too")
    parser.add_argument("overrides", nargs="*", help="configuration overrides, such as model.ternary=false")
    options = parser.parse_intermixed_args(argv)
    overrides = check_overrides(options.overrides)
    torch.set_num_threads(options.threads)
    if options.compile and not options.peer:
        raise UserError("--compile is for the peers of --peer; ours compiles with compile=true.")
    if options.peer:
        return main_peers(options, overrides)
    figures: dict[str, Any] = {"presets": {}}
    rows = []
    for preset in options.presets:
        batch, accumulate = SHAPES[preset]
        cfg = configure(preset, options.optim, overrides)
        entry = bench_preset(cfg, batch, accumulate, options.repeats)
        figures["presets"][preset] = entry
        rows.append(
            [preset, f"{entry['tokens_per_step']:,}", f"{entry['tokens_per_second']:,.0f}"]
            + [f"{100 * share:.1f}%" for share in entry["share"].values()]
        )
    if not options.no_lightning:
        batch, _ = SHAPES["tiny"]
        figures.update(bench_lightning(configure("tiny", options.optim, overrides), batch, steps=12, rounds=3))
    if not options.json:
        parts_of = list(next(iter(figures["presets"].values()))["share"])
        notes = [
            "Each part is timed alone; the rest of a step is additions, norms and bookkeeping. "
            "The optimizer's part includes the clipping."
        ]
        if "lightning_ratio" in figures:
            notes.append(
                f"A step of tiny under Lightning, with the callbacks that work at every step "
                f"({', '.join(EVERY_STEP)}), takes {figures['lightning_ratio']:.3f} x a bare loop's."
            )
        title = f"Training step, {options.optim}, {options.threads} thread(s)"
        show(title, ["preset", "tokens a step", "tokens/s", *parts_of], rows, notes)
    report(figures, options.json)
    return 0


def main_peers(options: Any, overrides: list[str]) -> int:
    """Compare with the peers; returns the exit code."""
    figures: dict[str, Any] = {"peers": {}}
    for preset in options.presets:
        cfg = configure(preset, options.optim, overrides)
        entry = bench_peers(cfg, *SHAPES[preset], options.repeats, options.peer, options.compile)
        figures["peers"][preset] = entry
        if not options.json:
            show_peers(preset, options.optim, options.threads, entry)
    report(figures, options.json)
    return 0
