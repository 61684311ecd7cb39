"""`nanochat bench step`: training speed at the shapes of the presets, where the time goes, and Lightning's share."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import lightning
import numpy as np
import torch
from lightning import Callback, LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from nanochat.bench.measure import clock, interleaved, report, seconds, show
from nanochat.config import compose
from nanochat.data.dataset import TrainBatches
from nanochat.lightning.module import NanoChatModule
from nanochat.objectives import linear_cross_entropy
from nanochat.run import settle

# preset: sequences of a micro-batch, micro-batches of a step
SHAPES = {"tiny": (6, 1), "d20": (8, 4), "nano-125m": (1, 8)}


class RandomTokens(LightningDataModule):
    """`count` micro-batches of random tokens for a module, cut by the training loader's own code and kept ready."""

    def __init__(self, module: NanoChatModule, batch: int, count: int) -> None:
        super().__init__()
        config = module.gpt.config
        size = batch * count * config.seq_len
        tokens = np.random.default_rng(0).integers(config.vocab_size, size=size + 2 * config.seq_len)
        self.source = TrainBatches(tokens, config.seq_len, batch, seed=0, vocab_size=config.vocab_size)
        self.batches = [
            {name: tensor.to(module.device) for name, tensor in self.source.batch(i).items()} for i in range(count)
        ]
        self.consumed = 0
        self.eot_id = None

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]


def build(preset: str, optim: str, overrides: list[str]) -> NanoChatModule:
    """The module of a preset as a user starts it, on the device that `auto` takes."""
    cfg = settle(compose([f"model={preset}", f"optim={optim}", "trainer.max_steps=1000", *overrides]))
    module = NanoChatModule(cfg).to("cuda" if cfg["trainer"]["accelerator"] in ("cuda", "gpu") else "cpu")
    module.configure_model()
    return module


def precision(module: NanoChatModule) -> torch.autocast:
    """The precision in which the Trainer would run the forward pass."""
    return torch.autocast(module.device.type, torch.bfloat16, enabled="bf16" in module.cfg["trainer"]["precision"])


def loss_of(module: NanoChatModule, batch: dict[str, Tensor]) -> Tensor:
    """Forward through the network and the head, as a training step does."""
    with precision(module):
        hidden = module.gpt.hidden(batch["tokens"])
        return linear_cross_entropy(hidden, module.gpt.head_weight(), batch["targets"]).loss


def optimizer_step(module: NanoChatModule, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's part of a step."""
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


def bench_preset(preset: str, optim: str, batch: int, accumulate: int, repeats: int, overrides: list[str]) -> dict:
    """Tokens per second of a whole step, and the share of each part in it."""
    module = build(preset, optim, overrides)
    config = module.gpt.config
    data = RandomTokens(module, batch, accumulate)
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


class _Clock(Callback):
    """Reads the clock after each optimizer step."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if len(self.marks) < trainer.global_step:
            self.marks.append(clock())


def bench_lightning(preset: str, optim: str, batch: int, steps: int, rounds: int) -> dict[str, float]:
    """Seconds of a step under the Trainer with our module's hooks, over those of a bare loop, rounds interleaved."""

    def bare() -> float:
        module = build(preset, optim, [])
        data = RandomTokens(module, batch, steps + 2)
        optimizer, marks = module.configure_optimizers(), []
        for micro in data.batches:
            bare_step(module, optimizer, [micro])
            marks.append(clock())
        return (marks[-1] - marks[1]) / steps

    def trainer() -> float:
        module = build(preset, optim, [])
        data = RandomTokens(module, batch, steps + 2)
        marks = _Clock()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lightning.Trainer(
                max_steps=steps + 2, max_epochs=-1, callbacks=[marks], logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
                accelerator=str(module.device.type), devices=1, default_root_dir=folder, use_distributed_sampler=False,
            ).fit(module, datamodule=data)  # fmt: skip
        return (marks.marks[-1] - marks.marks[1]) / steps

    pairs = [(bare(), trainer()) for _ in range(rounds)]
    ratios = sorted(t / b for b, t in pairs)
    return {"bare_step_seconds": pairs[0][0], "lightning_ratio": ratios[len(ratios) // 2]}


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="nanochat bench step", description=__doc__)
    parser.add_argument("--presets", nargs="+", default=["d20", "nano-125m"], choices=SHAPES)
    parser.add_argument("--optim", default="muon")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-lightning", action="store_true", help="leave out the comparison with a bare loop")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", help="configuration overrides, such as model.ternary=false")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {"presets": {}}
    rows = []
    for preset in options.presets:
        batch, accumulate = SHAPES[preset]
        entry = bench_preset(preset, options.optim, batch, accumulate, options.repeats, options.overrides)
        figures["presets"][preset] = entry
        rows.append(
            [preset, f"{entry['tokens_per_step']:,}", f"{entry['tokens_per_second']:,.0f}"]
            + [f"{100 * share:.1f}%" for share in entry["share"].values()]
        )
    if not options.no_lightning:
        figures.update(bench_lightning("tiny", options.optim, 6, steps=12, rounds=3))
    if not options.json:
        parts_of = list(next(iter(figures["presets"].values()))["share"])
        note = "Each part is timed alone; the rest of a step is additions, norms and bookkeeping."
        notes = [note]
        if "lightning_ratio" in figures:
            notes.append(f"A step of tiny under Lightning takes {figures['lightning_ratio']:.3f} x a bare loop's.")
        title = f"Training step, {options.optim}, {options.threads} thread(s)"
        show(title, ["preset", "tokens a step", "tokens/s", *parts_of], rows, notes)
    report(figures, options.json)
    return 0
