"""What a run's training takes in memory, before it starts.

Nothing is computed by a formula: one optimizer step of the run is rehearsed on tensors that have shapes and no memory,
through the very code that trains, and a `Ledger` counts what lives.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nanochat.config.features import feature_nodes
from nanochat.device import autocast, find_device
from nanochat.environment import rank_count
from nanochat.model.bitlinear import BitLinear, keep_trits
from nanochat.model.compact_backward import KeptRows
from nanochat.objectives import Step
from nanochat.objectives.token_filter import TopTokens, kept_count
from nanochat.optim.distributed import total_norm
from nanochat.optim.offload import Away, visits
from nanochat.training.callbacks.collider import Collider
from nanochat.training.ledger import GRADIENTS, KINDS, STATES, TRITS, WEIGHTS, Ledger
from nanochat.training.module import NanoChatModule, clip

linear_cross_entropy = importlib.import_module("nanochat.objectives.linear_cross_entropy")
"""the module, which a function of its own name hides"""
COARSE_BLOCK = 2**21
"""logits that the rehearsed loss turns into exponentials at a time: a sixteenth of the operations, some MB more"""


@dataclass(frozen=True)
class Memory:
    """Bytes of training at their peak."""

    parts: dict[str, int]
    """by what they are for (`KINDS`), at the moment of the peak"""
    moment: str
    """forward and backward, or optimizer"""
    others: dict[str, int]
    """the peak of each moment"""
    offloaded: int = 0
    """bytes of optimizer state in the CPU's memory, which count in none of these"""

    @property
    def peak(self) -> int:
        """bytes in all"""
        return sum(self.parts.values())

    @property
    def fixed(self) -> int:
        """bytes that neither a smaller micro-batch nor recomputation saves: weights and optimizer state"""
        return self.parts[WEIGHTS] + self.parts[STATES]


class Rehearsal:
    """The optimizer steps of a run in a plain loop, holding what a run holds, on tokens that mean nothing.

    Args:
        cfg: a settled configuration whose vocabulary is a number.
        device: of the tensors.
        ledger: what they are told to.
    """

    def __init__(self, cfg: dict[str, Any], device: torch.device, ledger: Ledger) -> None:
        self.cfg, self.device, self.ledger = cfg, device, ledger
        self.accumulate = int(cfg["trainer"].get("accumulate_grad_batches") or 1)
        with torch.device(device):
            self.module = NanoChatModule(cfg)
        self.named = dict(self.module.named_parameters())
        sharded = cfg["trainer"].get("strategy") == "fsdp2"
        self.sharing = rank_count(cfg) if sharded else 1
        """ranks that share weights, gradients and states"""
        self.offloaded = 0
        ledger.mark(WEIGHTS, self.named.values(), self.sharing)
        ledger.mark(WEIGHTS, self.module.buffers())
        keep_trits(self.module, self.accumulate > 1 and self.sharing == 1)
        self.optimizer = self.module.configure_optimizers()
        for parameter in self.named.values():
            parameter.register_post_accumulate_grad_hook(self._mark_gradient)
        nodes = feature_nodes(cfg, Collider).values()
        self.sparsity = max((float(node.get("sparsity", 0.4)) for node in nodes), default=0.0)
        data = cfg["data"]
        self.shape = int(data["batch_size"]), int(data["seq_len"])

    def _mark_gradient(self, parameter: Tensor) -> None:
        self.ledger.mark(GRADIENTS, [parameter.grad], self.sharing)

    def gathered(self) -> tuple[Counter[str], Counter[str]]:
        """What a rank has of the others' parts, beyond its own: in the backward of a block, and at its end.

        The tables and all that is in no block is gathered for a whole micro-batch. Of the blocks two are, the one
        at work and the next, which arrives in a buffer; the gradients of one are whole, beside the buffer that they
        are sent from. At the end those of the tables are.
        """
        if self.sharing == 1:
            return Counter(), Counter()
        blocks = [block for part in self.module.objectives.values() for block in part.blocks()]  # type: ignore[operator]
        sizes = [_bytes(block.parameters()) for block in (*self.module.gpt.blocks, *blocks)]
        rest = _bytes(self.named.values()) - sum(sizes)
        largest = max(sizes, default=0)
        others = rest * (self.sharing - 1) // self.sharing
        block = Counter({WEIGHTS: others + 3 * largest, GRADIENTS: 2 * largest})
        return block, Counter({WEIGHTS: others, GRADIENTS: 2 * rest})

    def make_states(self) -> None:
        """The optimizer's state as of the first step."""
        for group in self.optimizer.param_groups:
            for index, parameter in enumerate(group["params"]):
                state = self.optimizer.make_state(parameter, group, index)
                self.optimizer.state[parameter] = state
                away = list(state.away()) if isinstance(state, Away) else []
                self.offloaded += self.ledger.leave_out(away) // self.sharing
                here = [v for v in state.values() if isinstance(v, Tensor) and not any(v is one for one in away)]
                self.ledger.mark(STATES, here, self.sharing)

    def filter_tokens(self, sparsity: float) -> None:
        """Let the next micro-batches do without a backward pass for a share of the tokens."""
        self.sparsity = sparsity
        self.module.gpt.kept_rows = KeptRows() if sparsity else None
        selector = TopTokens(kept_count(self.shape[1], sparsity)) if sparsity else None
        self.module.objectives["next_token"].selector = selector  # type: ignore[assignment]

    def micro_batch(self) -> None:
        """Forward and backward."""
        module, shape = self.module, self.shape
        for linear in module.modules():
            if isinstance(linear, BitLinear) and linear.ternary and linear.keep_trits:
                self.ledger.mark(TRITS, linear.quantised())
        tokens = torch.zeros(shape, dtype=torch.int64, device=self.device)
        targets = torch.arange(shape[1], device=self.device).remainder(2).expand(shape)
        self.filter_tokens(self.sparsity)
        with self.ledger.saving():
            with autocast(self.device, self.cfg["trainer"]["precision"]):
                step = Step.of(module.gpt, tokens, targets, max_steps=module.max_steps)
                loss = torch.stack([objective(step) for objective in module.objectives.values()]).sum()
            del step
            (loss / self.accumulate).backward()

    def update(self, every: bool = True) -> None:
        """The optimizer's step with the clipping before it.

        every: update every parameter; else one of each shape and group, which on a CPU takes as much memory, since
            there they are updated one by one.
        """
        module, optimizer = self.module, self.optimizer
        if most := self.cfg["trainer"].get("gradient_clip_val"):
            gradients = [p.grad for p in self.named.values() if p.grad is not None]
            clip(gradients, most, total_norm(gradients))
        optimizer.set_progress(1, module.max_steps, module.schedule)
        for group in optimizer.param_groups:
            if group.get("kernels") == "bitsandbytes":  # which work in place
                used = [p for p in group["params"] if p.grad is not None]
                for _ in visits(used, used, [optimizer.state[p] for p in used]):
                    pass
                continue
            shapes = {tuple(p.shape): p for p in group["params"]}
            optimizer.step_group(group if every else {**group, "params": list(shapes.values())})
        optimizer.zero_grad()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def predict(cfg: dict[str, Any], fake: bool = True, update: bool = True) -> Memory:
    """What training takes at its peak, on the device of the run.

    It is that of an optimizer step but for the first, whose optimizer has no state yet. Not in it: Python and torch
    themselves (about half a gigabyte of a CPU's memory), what kernels allocate for themselves, prefetched batches, a
    reference model of Collider's, validation and samples, whose memory is less. A compiled block saves other
    activations than the blocks that are rehearsed, mostly fewer. What `trainer=fsdp2` gathers is estimated: two blocks
    and the tables, and the update as if whole matrices arrived at this rank one by one.

    Args:
        cfg: a settled configuration whose vocabulary is a number.
        fake: on tensors without memory; False computes the step, which tests compare.
        update: count the optimizer's update, too, which depends on neither batch, precision nor checkpointing.
    """
    device = find_device(cfg["trainer"]["accelerator"])
    ledger, coarse = (
        Ledger(device if fake else None),
        mock.patch.object(linear_cross_entropy, "CPU_BLOCK", COARSE_BLOCK),
    )
    with ledger, coarse:
        run = Rehearsal(cfg, device, ledger)
        run.make_states()
        if run.accumulate > 1:
            for parameter in run.named.values():
                parameter.grad = torch.zeros_like(parameter)
                run._mark_gradient(parameter)
        ledger.restart()
        run.micro_batch()
        if run.sparsity:  # the first steps of such a run see all tokens
            if run.accumulate == 1:
                run.optimizer.zero_grad()
            run.filter_tokens(0.0)
            run.micro_batch()
        moments: dict[str, Counter[str]] = {"forward and backward": ledger.peak}
        if run.sharing > 1:
            block, end = run.gathered()
            moments = {"forward and backward": ledger.peak + block, "end of the backward": ledger.held + end}
        if update:
            ledger.restart()
            run.update(every=device.type != "cpu")
            moments["optimizer"] = ledger.peak
    totals = {moment: sum(peak.values()) for moment, peak in moments.items()}
    moment = max(totals, key=totals.__getitem__)
    return Memory({kind: moments[moment][kind] for kind in KINDS}, moment, totals, run.offloaded)
