"""The LightningModule: a GPT, its objectives, one optimizer, and what an exact resume needs.

The order of one optimizer step (M: a method of the module below, C: a hook of a callback):

    on_train_batch_start (C)          the filter chooses its selector           } for each of the
    training_step (M)                 the sum of the objectives; data.consumed  } accumulated
    backward                          gradients add up in p.grad                } micro-batches
    on_before_optimizer_step (C)      the guard calls read_numbers() (M): a step that is not finite is skipped
    configure_gradient_clipping (M)   clips by the same norm
    optimizer_step (M)                around the last micro-batch: sets the rates before it, fills step_metrics after it
    on_step_end (C)                   global_step has gone up; in the order of conf/callbacks: throughput, metrics.csv,
                                      the bar, the checkpoint, signals
    validation, where one is due      after the checkpoint, so that a run stopped in it loses nothing else

A checkpoint is therefore always of whole steps; on_save_checkpoint and on_load_checkpoint (M) carry what Lightning does
not: the random generators, and the rates' factor after a return to an earlier checkpoint.

One host sync a step: `read_numbers` (M), before the update is queued, since all that a step logs is known by then. A
validation adds up on the device and reads its sums at the end.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import lightning
import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from nanochat import ranks
from nanochat.checkpoint import CHECKPOINT_FORMAT
from nanochat.config.features import build_objective, feature_nodes
from nanochat.model import GPT, GPTConfig
from nanochat.model.bitlinear import keep_trits
from nanochat.model.checkpointing import set_checkpointing
from nanochat.model.low_precision import keep_in_bfloat16
from nanochat.objectives import IGNORED, NextToken, Objective, Step, linear_cross_entropy
from nanochat.optim import Optimizer
from nanochat.optim.build import Named
from nanochat.optim.distributed import total_norm
from nanochat.optim.rounding import Rounding
from nanochat.training.rng import get_rng_state, set_rng_state


def model_config(cfg: dict[str, Any]) -> GPTConfig:
    """The network's configuration out of a resolved run configuration."""
    return GPTConfig.from_dict({k: v for k, v in cfg["model"].items() if not k.startswith("_")})


@torch.no_grad()
def clip(gradients: list[Tensor], most: float, norm: Tensor) -> None:
    """Scale gradients in place so that their norm, which is known, is at most `most`."""
    torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))  # type: ignore[attr-defined]


def build_optimizer(cfg: dict[str, Any], named: Named) -> Optimizer:
    """The one optimizer of a run over some parameters; cfg: as the module's."""
    optimizer: Optimizer = instantiate(cfg["optim"])(named_parameters=named)
    weights = cfg.get("weights") or "float32"
    if weights != "float32":
        optimizer.rounding = Rounding(int(cfg.get("seed", 0)), master=weights == "bfloat16-master")
    optimizer.offload = bool(cfg.get("offload_optimizer"))
    return optimizer


class NanoChatModule(lightning.LightningModule):
    """Trains a GPT on the sum of its objectives.

    Args:
        cfg: the resolved configuration as a plain dict (so that a checkpoint loads with `weights_only=True`).
        rate_scale: a factor of all learning rates; below 1 once training has diverged and returned to a checkpoint. A
            checkpoint that is loaded may lower it.

    The two seams: `objectives` holds the terms of the loss, next-token first, and a callback may set
    `objectives["next_token"].selector`. After each optimizer step `step_metrics` holds its numbers for the callbacks.
    """

    def __init__(self, cfg: dict[str, Any], rate_scale: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters({"cfg": cfg})
        self.cfg = cfg
        config, seed = model_config(cfg), int(cfg.get("seed", 0))
        # ranks that share the model are sent their parts of rank 0's
        absent = cfg["trainer"].get("strategy") == "fsdp2" and ranks.rank() > 0
        with torch.device("meta") if absent else contextlib.nullcontext():
            self.gpt = GPT(config, seed=seed)
        loss = {k: v for k, v in (cfg.get("loss") or {}).items() if not k.startswith("_")}
        self.objectives = nn.ModuleDict({"next_token": NextToken(config, seed=seed, **loss)})
        for name, node in feature_nodes(cfg, Objective).items():
            self.objectives[name] = build_objective(node, config=config, seed=seed)
        if (cfg.get("weights") or "float32") != "float32":
            keep_in_bfloat16(self)
        set_checkpointing(self, cfg.get("activation_checkpointing") or "none")
        self.schedule = instantiate(cfg["schedule"])
        self.max_steps: float = int(cfg["trainer"]["max_steps"] or -1)
        """of the run; where it ends with its time, an estimate that `TimeLimit` makes before each step"""
        self.rate_scale = rate_scale
        self.step_metrics: dict[str, float] = {}
        self.validated_at: int | None = None
        """optimizer steps done at the last validation"""
        self._sums: dict[str, Tensor] = {}
        self._micro_batches = 0
        self._gradient_norm: Tensor | None = None
        self._means: dict[str, Tensor] | None = None
        self._numbers: dict[str, float] | None = None
        self._validation = torch.zeros(3, dtype=torch.float64)
        self._rng_state: dict[str, Any] | None = None

    # ---- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of one micro-batch {tokens, targets: (B, T) int64}."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        step = Step.of(
            self.gpt,
            batch["tokens"],
            batch["targets"],
            step=self.global_step,
            max_steps=self.max_steps,
            micro_step=data.consumed,
            eot_id=data.eot_id,
        )
        loss = torch.stack([objective(step) for objective in self.objectives.values()]).sum()
        for name, value in step.metrics.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._micro_batches += 1
        # here and not at the end of the batch: a checkpoint is written before the module's own end-of-batch hook
        data.consumed += 1
        return loss

    def gradient_norm(self) -> Tensor:
        """The global L2 norm of the gradients of this optimizer step, taken once."""
        if self._gradient_norm is None:
            owners = getattr(self.optimizers(use_pl_optimizer=False), "owners", None)
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            norm: Tensor = owners.gradient_norm() if owners else total_norm(gradients)
            self._gradient_norm = norm
        return self._gradient_norm

    def step_means(self) -> dict[str, Tensor]:
        """Name -> mean over this optimizer step's micro-batches so far, and over the ranks; 0-d, taken once."""
        if self._means is None:
            means = {name: total / self._micro_batches for name, total in self._sums.items()}
            if means and ranks.world() > 1:  # each rank's share of the mean over all (nanochat.ranks.share)
                stacked = ranks.add(torch.stack([mean.float() for mean in means.values()])) / ranks.world()
                means = dict(zip(means, stacked, strict=True))
            self._means = means
        return self._means

    def read_numbers(self, *more: Tensor) -> list[float]:
        """Bring this optimizer step's means and gradient norm to the host: one transfer, for its `step_metrics`.

        more: 0-d tensors that travel with them; returns their values.
        """
        known = dict(self.step_means())
        if self._gradient_norm is not None:
            known["train/grad_norm"] = self._gradient_norm
        values = [*known.values(), *more]
        read = torch.stack([value.to(values[0].device) for value in values]).tolist() if values else []
        self._numbers = dict(zip(known, read, strict=False))
        return read[len(known) :]

    @property
    def numbers(self) -> dict[str, float]:
        """What `read_numbers` has read."""
        if self._numbers is None:
            self.read_numbers()
        assert self._numbers is not None
        return self._numbers

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the norm that the non-finite guard has already taken."""
        if gradient_clip_val:
            gradients = [ranks.own_part(p.grad) for p in self.parameters() if p.grad is not None]
            clip(gradients, gradient_clip_val, self.gradient_norm())

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        """One optimizer step, with every rate set as a function of (step, max_steps) alone."""
        done = self.global_step

        def schedule(step: int, max_steps: float) -> float:
            return self.rate_scale * self.schedule(step, max_steps)

        optimizer.set_progress(done, self.max_steps, schedule)  # type: ignore[attr-defined]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()  # here, since Lightning would hold the gradients until the next backward pass
        self.step_metrics = self.numbers
        self.step_metrics["train/lr"] = schedule(done, self.max_steps) * float(self.cfg["optim"]["lr"])
        self._sums, self._micro_batches = {}, 0
        self._gradient_norm = self._means = self._numbers = None

    def configure_optimizers(self):
        """The one optimizer over all named parameters (frozen ones left out)."""
        return build_optimizer(self.cfg, [(name, p) for name, p in self.named_parameters() if p.requires_grad])

    def configure_model(self) -> None:
        """Compile block by block, which keeps the state dict's keys and pays on CUDA."""
        if self.cfg.get("compile") is True:
            for block in self.gpt.blocks:
                block.compile()

    # ---- validation ---------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        dtype = torch.float32 if self.device.type == "mps" else torch.float64  # which MPS lacks
        self._validation = torch.zeros(3, dtype=dtype, device=self.device)  # nats, tokens, bytes
        table = self.trainer.datamodule.token_bytes()  # type: ignore[attr-defined]
        self._token_bytes = None if table is None else torch.as_tensor(table, device=self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds the batch's nats, tokens and bytes, on the device; validation never sees a selector."""
        targets = batch["targets"]
        result = linear_cross_entropy(
            self.gpt.hidden(batch["tokens"]),
            self.gpt.head_weight(),
            targets,
            softcap=self.gpt.config.softcap,
            chunk=self.objectives["next_token"].chunk,  # type: ignore[arg-type]
        )
        dtype, valid = self._validation.dtype, targets != IGNORED
        sums = [result.per_token.sum(dtype=dtype), valid.sum().to(dtype)]
        if self._token_bytes is not None:  # indexing by `valid` would wait for the device
            sums.append((self._token_bytes[targets.clamp_min(0)] * valid).sum().to(dtype))
        self._validation[: len(sums)] += torch.stack(sums)

    def on_validation_epoch_end(self) -> None:
        """`val/loss` in nats per token and `val/bpb` in bits per byte of text."""
        self.validated_at = self.global_step
        nats, tokens, size = ranks.add(self._validation).tolist()
        metrics = {"val/loss": nats / max(tokens, 1.0)}
        if size:
            metrics["val/bpb"] = nats / math.log(2) / size
        self.log_dict(metrics, prog_bar=True, logger=False)

    # ---- resume -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what makes a resume exact: the format, the random generators, threads and compile mode."""
        checkpoint["nanochat_format"] = CHECKPOINT_FORMAT
        checkpoint["nanochat_run"] = {
            "rng": get_rng_state(),
            "threads": torch.get_num_threads(),
            "compile": bool(self.cfg.get("compile") is True),
            "torch": str(torch.__version__),
            "rate_scale": self.rate_scale,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the random generators for the start of training, after everything else has drawn from them, and the
        rates as low as the run has had to make them."""
        self._rng_state = checkpoint["nanochat_run"]["rng"]
        self.rate_scale = min(self.rate_scale, float(checkpoint["nanochat_run"].get("rate_scale", 1.0)))

    def on_train_start(self) -> None:
        # of sharded weights they would be whole on every rank
        keep_trits(self, self.trainer.accumulate_grad_batches > 1 and not isinstance(self, FSDPModule))
        if self._rng_state is not None:
            set_rng_state(self._rng_state)
            self._rng_state = None

    def on_train_end(self) -> None:
        keep_trits(self, False)
