"""Collider: token filtering whose backward pass really shrinks (arXiv:2502.00340).

The forward pass sees every token. Of each sequence the tokens with the highest score are kept, a fixed number; the loss
is the mean over them, and the backward of the head and of every block runs on their rows alone
(`nanochat.model.compact_backward`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from nanochat import ranks
from nanochat.checkpoint import load_run
from nanochat.errors import ConfigError, UserError
from nanochat.model import GPT
from nanochat.model.compact_backward import KeptRows
from nanochat.objectives.linear_cross_entropy import Selector, linear_cross_entropy
from nanochat.objectives.sampling import generator
from nanochat.objectives.token_filter import GradientSample, TopTokens, kept_count
from nanochat.training.score_cache import ScoreCache

SCORES = ("loss", "excess", "random", "gradient")


class Collider(Callback):
    """Filters the tokens of training; validation never sees it.

    Args:
        sparsity: share of each sequence's tokens that get no backward, in [0, 1); 0 changes nothing at all.
        score: `loss` keeps the hardest tokens (the paper's simple score, in our study the worst); `excess` those whose
            loss exceeds a reference model's the most (Rho-1, arXiv:2404.07965); `random`; `gradient` draws tokens by
            the size of their gradient and weighs them by 1 / probability, so that the gradient at the head and at the
            final hidden states is unbiased (below them the tokens that were dropped are missing as keys and values, and
            terms such as MTP's are plain means over the kept tokens). None: `excess` with a reference, else `random`.
        reference: run folder or checkpoint of the reference model, of the same tokenizer (for `excess`).
        cache: folder in which the reference's losses are kept, so that later runs on the same data need not compute
            them.
        warmup_steps: optimizer steps that train on all tokens first, at most a tenth of the run: the losses of an
            untrained model say nothing about its tokens.
    """

    def __init__(
        self,
        sparsity: float = 0.4,
        score: str | None = None,
        reference: str | None = None,
        cache: str | None = None,
        warmup_steps: int = 100,
    ) -> None:
        if score is None:
            score = "excess" if reference else "random"
        problems = []
        if not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
            problems.append(f"collider.sparsity={sparsity!r} must lie in [0, 1) (0 is off).")
        if score not in SCORES:
            problems.append(f"collider.score={score!r} is unknown; choose one of {', '.join(SCORES)}.")
        if (score == "excess") != bool(reference):
            problems.append("collider.score=excess and collider.reference=RUN belong together: give both or neither.")
        if cache and not reference:
            problems.append("collider.cache holds a reference model's losses: give collider.reference=RUN too.")
        if not isinstance(warmup_steps, int) or warmup_steps < 0:
            problems.append(f"collider.warmup_steps={warmup_steps!r} must be a whole number of at least 0.")
        if problems:
            raise ConfigError(problems)
        self.sparsity, self.score, self.warmup_steps = float(sparsity), score, warmup_steps
        self.reference_path, self.cache_path = reference, cache
        self._reference: GPT | None = None
        self._cache: ScoreCache | None = None

    def describe(self) -> str:
        """For a run's header and card; empty where the sparsity switches it off."""
        return f"Collider ({self.score}, {self.sparsity:.0%} dropped)" if self.sparsity else ""

    # ---- the two seams ------------------------------------------------------------------------------------------

    def attach(self, module: LightningModule, selector: Selector) -> None:
        """Set the selector for the next forward, and the rows that its choice goes to."""
        module.gpt.kept_rows = KeptRows()  # type: ignore[union-attr]
        module.objectives["next_token"].selector = selector  # type: ignore[index]

    def detach(self, module: LightningModule) -> None:
        """Back to all tokens."""
        module.gpt.kept_rows = None  # type: ignore[union-attr]
        module.objectives["next_token"].selector = None  # type: ignore[index]

    # ---- hooks --------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the reference model."""
        if stage == "fit" and self.sparsity and self.reference_path and self._reference is None:
            self._reference = self._load_reference(trainer, pl_module)
            if self.cache_path:
                self._cache = ScoreCache(Path(self.cache_path), self._reference)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self.detach(pl_module)
        self._reference = self._cache = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Choose how this micro-batch is filtered."""
        done = trainer.global_step
        if not self.sparsity or (done < self.warmup_steps and 10 * (done + 1) <= pl_module.max_steps):  # type: ignore[operator]
            return
        shape = batch["targets"].shape
        count = kept_count(shape[1], self.sparsity)
        targets = batch["targets"]
        selector: Selector
        if self.score == "random":
            selector = TopTokens(count, scores=self._draw(trainer, pl_module, *shape))
        elif self.score == "gradient":
            selector = GradientSample(count, targets, self._draw(trainer, pl_module, shape[0]))
        elif self.score == "excess":
            selector = TopTokens(count, baseline=self._reference_losses(batch))
        else:
            selector = TopTokens(count)
        self.attach(pl_module, selector)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Whatever runs between two batches (validation, samples) sees the plain model."""
        self.detach(pl_module)

    @staticmethod
    def _draw(trainer: Trainer, module: LightningModule, rows: int, *more: int) -> Tensor:
        """(rows, *more) uniform numbers: this rank's part of what is drawn for the rows of all."""
        source = generator(int(module.cfg["seed"]), "collider", trainer.datamodule.consumed)  # type: ignore[attr-defined]
        drawn = torch.rand((rows * ranks.world(), *more), generator=source)[ranks.own_rows(rows)]
        return drawn.to(module.device, non_blocking=True)  # a copy that blocks waits for all that is queued

    # ---- the reference model ------------------------------------------------------------------------------------

    def _load_reference(self, trainer: Trainer, module: LightningModule) -> GPT:
        run = load_run(self.reference_path, device=module.device)  # type: ignore[arg-type]
        ours = trainer.datamodule.tokenizer.token_bytes()  # type: ignore[attr-defined]
        theirs = run.tokenizer.token_bytes()
        if ours is not None and (theirs is None or not np.array_equal(ours, theirs)):
            raise UserError(
                f"collider.reference={self.reference_path} has another tokenizer than this run: its losses are "
                "not of the same tokens."
            )
        if run.config.seq_len < module.gpt.config.seq_len:  # type: ignore[union-attr]
            raise UserError(
                f"collider.reference={self.reference_path} reads {run.config.seq_len} tokens, fewer than this "
                f"run's sequences of up to {module.gpt.config.seq_len}."  # type: ignore[union-attr]
            )
        return run.gpt.requires_grad_(False)

    @torch.no_grad()
    def _reference_losses(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, T) float32."""
        tokens, targets = batch["tokens"], batch["targets"]
        if self._cache is not None and (cached := self._cache.get(tokens, targets)) is not None:
            return cached
        gpt = self._reference
        assert gpt is not None
        hidden = gpt.hidden(tokens)
        losses = linear_cross_entropy(hidden, gpt.head_weight(), targets, softcap=gpt.config.softcap).per_token
        if self._cache is not None:
            losses = self._cache.put(tokens, targets, losses)
        return losses
