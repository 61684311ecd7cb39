"""Several ranks under Lightning: each trains on its rows, and the optimizer's owners do the rest."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from torch.optim import Optimizer

from nanochat import ranks


class OwnersStrategy(DDPStrategy):
    """Data parallel without torch's wrapper: gradients travel once a step, to the owners of their parameters.

    The wrapper would send every gradient to every rank in each step, of which only the owner's is used, and the
    weights would follow: half as many bytes again (see nanochat.optim.distributed). The process group exists already.
    """

    def __init__(self) -> None:
        # whoever has started the ranks has set torchrun's variables, in a SLURM job, too
        super().__init__(cluster_environment=TorchElasticEnvironment(), timeout=ranks.TIMEOUT)

    def configure_ddp(self) -> None:
        """Leave the model as it is; its weights are rank 0's, whatever the other machines' kernels drew."""
        assert self.model is not None
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            dist.broadcast(tensor.detach(), 0)
        torch.autograd.graph.increment_version(list(self.model.parameters()))

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            optimizer.distribute()  # type: ignore[attr-defined]

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Of all ranks, on rank 0, which alone writes it."""
        return (optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()
