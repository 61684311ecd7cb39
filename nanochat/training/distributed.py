"""Several ranks under Lightning: each trains on its rows, and the optimizer's owners do the rest.

`OwnersStrategy` (trainer=ddp) keeps weights and gradients whole on every rank, `ShardsStrategy` (trainer=fsdp2) a part
of each.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from nanochat import ranks
from nanochat.errors import UserError
from nanochat.optim.distributed import gather_states, scatter_rows
from nanochat.optim.sharded import is_sharded, part_shapes
from nanochat.training.module import NanoChatModule


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


class ShardsStrategy(OwnersStrategy):
    """Weights, gradients and optimizer states sharded by torch's `fully_shard` (FSDP2).

    Not Lightning's ModelParallelStrategy: that one makes the process group itself, saves in a format of its own, and
    takes the optimizer's state apart as torch's optimizers have it. What it would do for us is the call of `shard`.
    """

    def setup(self, trainer: Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            super().setup(trainer)
            return
        assert self.accelerator is not None  # a validation after the training: all is in its place
        self.accelerator.setup(trainer)
        self.setup_precision_plugin()

    def model_to_device(self) -> None:
        """Move the model once it is sharded: the device of a rank need not have room for the whole."""
        if isinstance(self.model, FSDPModule):
            super().model_to_device()

    @torch.no_grad()
    def configure_ddp(self) -> None:
        """Cut the model, which rank 0 alone has, and give each rank its rows."""
        module = self.model
        assert isinstance(module, NanoChatModule)
        whole = {name: parameter.detach() for name, parameter in module.named_parameters()} if not ranks.rank() else {}
        shard(module, self.root_device)
        if ranks.rank():
            module.gpt.to_empty(device=self.root_device)
        self.model_to_device()
        for name, parameter in module.named_parameters():
            counts = [shape[0] for shape in part_shapes(parameter, ranks.world())]
            scatter_rows(whole.pop(name, None), ranks.own_part(parameter), counts)
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Before the model is cut, on the rank that has it."""
        if not ranks.rank():
            super().load_model_state_dict(checkpoint, strict)

    def on_validation_end(self) -> None:
        """Give back the weights outside of the blocks, which stay gathered after a forward pass without a backward."""
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on the CPU of rank 0, which alone writes them, gathered one by one; empty elsewhere."""
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict()
        parts = {"": {name: ranks.own_part(tensor) for name, tensor in state.items() if is_sharded(tensor)}}
        gathered = gather_states(parts, split=parts)
        return {} if gathered is None else {name: gathered[""].get(name, state[name]) for name in state}

    def teardown(self) -> None:
        """As the base class, but that the model stays where it is: it is validated once more after its training."""
        module, self._lightning_module = self._lightning_module, None
        super().teardown()
        self._lightning_module = module


def shard(module: NanoChatModule, device: torch.device) -> None:
    """Cut every weight of a module into rows, one part for each rank, on its device.

    A block, or a head of an objective, has its weights gathered while it computes, forward and backward. The tables,
    the final norm and what else objectives have are gathered for a whole micro-batch, since the loss reads the output
    matrix outside of the network.

    Raises:
        UserError: the weights are of several dtypes, and this torch cannot shard them.
    """
    mesh = init_device_mesh(device.type, (ranks.world(),))
    options: dict[str, Any] = {"mesh": mesh}
    if any(parameter.dtype == torch.bfloat16 for parameter in module.parameters()):
        options |= {
            "shard_placement_fn": apart(device, ranks.timeout_of(module.cfg)),
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        }
    heads = [block for objective in module.objectives.values() for block in objective.blocks()]  # type: ignore[operator]
    for part in (*module.gpt.blocks, *heads, module):
        fully_shard(part, **options)
        if device.type == "cpu":  # gloo does not average
            part.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
    for name in ("training_step", "validation_step"):
        register_fsdp_forward_method(module, name)


def apart(device: torch.device, timeout: datetime.timedelta) -> Callable[[Tensor], Any]:
    """For `fully_shard`: what is in bfloat16 travels apart, through a process group of its own, as a group of
    parameters has one dtype."""
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
    except ImportError:
        text = f"weights=bfloat16 with trainer=fsdp2 needs torch 2.13 or newer, and this is {torch.__version__}."
        raise UserError(text) from None
    other = DeviceMesh.from_group(dist.new_group(timeout=timeout), device.type)  # type: ignore[arg-type]
    narrow = ShardPlacementResult(placement=None, mesh_info=FSDPMeshInfo(other, 0))
    return lambda parameter: narrow if parameter.dtype == torch.bfloat16 else None
