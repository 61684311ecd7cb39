"""APOLLO-Mini (Zhu et al., arXiv:2412.05270): SGD whose rate, one for each tensor, AdamW finds in a space of rank 1."""

from __future__ import annotations

import torch
from torch import Tensor

from nanochat.optim.options import betas, number, option, positive, whole
from nanochat.optim.quantized import rounding_generator
from nanochat.optim.rule import Group, Rule, State, check_matrix, in_float32
from nanochat.optim.rules.adamw import adamw_state, adamw_step
from nanochat.optim.rules.galore import check_rank, resolved_rank


def random_projector(rank: int, side: int, epoch: int, index: int, device: torch.device) -> Tensor:
    """N(0, 1 / rank) of (rank, side), a function of the refreshes so far and the parameter: never stored.

    Drawn on the device itself: a copy from the host would be a host sync for each matrix.
    """
    generator = rounding_generator(epoch, index, device)
    return torch.randn(rank, side, generator=generator, device=device) * rank**-0.5


class Apollo(Rule):
    """W <- W - lr scale s G with s = |AdamW's direction of P G| / |P G|, of the whole tensor at rank 1, else of each
    channel along the longer side. A step's norm grows at most by `norm_growth_limit` over the last one's.
    """

    name = "apollo"

    class Options:
        """Those of AdamW, of the projection, the factor on the update and the limiter."""

        betas: tuple[float, float] = betas(0.9, 0.999)
        eps: float = positive(1e-8)
        rank: int | float | str = option(1, check_rank, saved=True)
        update_period: int = whole(200, 1)
        scale: float = number(128**0.5)
        norm_growth_limit: float = number(1.01, 1.0)

    def check(self, group: Group, name: str, parameter: Tensor) -> None:
        check_matrix(group, name, parameter)
        resolved_rank(group["rank"], parameter, name)

    def init(self, parameter: Tensor, group: Group, index: int) -> State:
        space = parameter.new_empty(resolved_rank(group["rank"], parameter), max(parameter.shape))
        norm = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"steps": 0, "index": index, "norm": norm, **adamw_state(space)}

    def step(self, group: Group, parameters: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        unit = {**group, "lr": 1.0, "weight_decay": 0.0}
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            tall, gradient = parameter.shape[0] > parameter.shape[1], gradient.float()
            flat = gradient.mT if tall else gradient  # (short, long)
            epoch = state["steps"] // group["update_period"]
            rank = state["exp_avg"].shape[0]
            projected = random_projector(rank, flat.shape[0], epoch, state["index"], gradient.device) @ flat
            direction = torch.zeros_like(projected)
            adamw_step(unit, [direction], [projected], [state])
            along = None if rank == 1 else 0
            before = torch.linalg.vector_norm(projected, dim=along)
            factor = torch.linalg.vector_norm(direction, dim=along) / before.clamp_min(1e-30)  # () or (long,)
            factor.mul_(before > 0)
            if along is not None and tall:
                factor = factor[:, None]
            update = gradient * factor
            norm, last = torch.linalg.vector_norm(update), state["norm"]
            # no limit over a step of norm 0, as behind projections that start at zero
            limit = torch.where(last > 0, group["norm_growth_limit"] * last, norm)
            shrink = torch.where(norm > limit, limit / norm.clamp_min(1e-30), 1.0)
            state["norm"].copy_(norm * shrink)
            state["steps"] += 1
            with in_float32(parameter) as p:
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.sub_(update.mul_(shrink * (group["lr"] * group["scale"])))
