"""GaLore 2: optimizer states in the rank-r space of each matrix' gradient (arXiv:2403.03507, arXiv:2504.20437).

G (r x c) is projected on its shorter side, rows say: R = P^T G with P (rows x rank) orthonormal. The rule inside turns
R into a direction; the weights are updated by P times it. P is refreshed by a randomised SVD every `update_period`
steps, each matrix at another step, and the states follow into the new space. A refresh waits for the GPU (`eigh`), the
steps between do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.optim.newton_schulz import newton_schulz_flops
from nanochat.optim.options import betas, number, option, positive, whole
from nanochat.optim.quantized import SMALL, Options8bit, dequantize, rounding_generator, store
from nanochat.optim.rule import FLOPS, Group, Rule, State, check_matrix, in_float32
from nanochat.optim.rules.adamw import adamw_state, adamw_step
from nanochat.optim.rules.adamw8bit import adam8bit_state, adam8bit_step
from nanochat.optim.rules.muon import Muon, MuonOptions, muon8bit_state, muon_updates, update_scale


def randomized_projector(
    gradient: Tensor, rank: int, oversampling: int, power_iterations: int, generator: torch.Generator
) -> Tensor:
    """The leading left singular vectors of a gradient (short x long), nearly: (short, rank), orthonormal, float32.

    Halko, Martinsson and Tropp (arXiv:0909.4061), sections 4.5 and 5.1.
    """
    gradient = gradient.float()
    width = min(rank + oversampling, gradient.shape[0])
    sketch = torch.randn(gradient.shape[1], width, generator=generator, device=gradient.device)
    basis = torch.linalg.qr(gradient @ sketch)[0]  # (short, width)
    for _ in range(power_iterations):
        # no QR in between: what float32 then loses has a millionth of the energy
        basis = torch.linalg.qr(gradient @ (gradient.mT @ basis))[0]
    inner = basis.mT @ gradient  # (width, long)
    vectors = torch.linalg.eigh(inner @ inner.mT)[1]  # ascending
    return basis @ vectors[:, -rank:].flip(-1)


def resolved_rank(rank: int | float | str, parameter: Tensor, name: str = "a matrix") -> int:
    """Rank for a matrix, at most its shorter side; a fraction is one of that side; `full` is the side itself.

    Raises `UserError` when it is larger.
    """
    side = min(parameter.shape)
    if rank == "full":
        return side
    found = max(1, round(rank * side)) if isinstance(rank, float) else int(rank)
    if found > side:
        raise UserError(
            f"optim.rank={rank} is larger than {name} of shape {tuple(parameter.shape)}; "
            f"at most {side}, a fraction of the shorter side such as 0.25, or full."
        )
    return found


def check_rank(value: Any, what: str) -> int | float | str:
    """A rank as a config gives it; raises `UserError` naming `what`."""
    if value == "full" or (isinstance(value, float) and 0.0 < value < 1.0):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise UserError(f"{what} must be a whole number of at least 1, a fraction of the shorter side, or full.")


@dataclass(frozen=True)
class ProjectionOptions:
    """How gradients are projected, and the factor on the update."""

    rank: int | float | str = option(0.25, check_rank, saved=True)
    update_period: int = whole(200, 1)
    scale: float = number(0.25)
    power_iterations: int = whole(2)
    oversampling: int = whole(8)


class GaLore(Rule):
    """GaLore with AdamW inside. `rank=full` projects nothing: AdamW with its direction times `scale`."""

    name = "galore"

    class Options(ProjectionOptions):
        """Those of the projection and of AdamW."""

        betas: tuple[float, float] = betas(0.9, 0.999)
        eps: float = positive(1e-8)

    def check(self, group: Group, name: str, parameter: Tensor) -> None:
        check_matrix(group, name, parameter)
        resolved_rank(group["rank"], parameter, name)

    def init(self, parameter: Tensor, group: Group, index: int) -> State:
        rank, (rows, columns) = resolved_rank(group["rank"], parameter), parameter.shape
        space = parameter.new_empty((rank, columns) if rows <= columns else (rows, rank))
        state = {"steps": 0, "index": index, **self.init_inner(space, group, index)}
        if rank < min(rows, columns):
            state["projector"] = torch.zeros(min(rows, columns), rank, dtype=torch.float32, device=parameter.device)
        return state

    def cost(self, group: Group, parameter: Tensor) -> float:
        rank = resolved_rank(group["rank"], parameter)
        return parameter.numel() * (1.0 + 4.0 * rank / FLOPS)  # there and back; refreshes are rare

    def init_inner(self, space: Tensor, group: Group, index: int) -> State:
        """State of the rule inside, for a tensor of the projected shape."""
        return adamw_state(space)

    def direction(self, projected: Tensor, state: State, group: Group) -> Tensor:
        """Update the state by the projected gradient; the direction, as large as AdamW's."""
        delta = torch.zeros_like(projected)
        unit = {**group, "lr": 1.0, "weight_decay": 0.0}
        adamw_step(unit, [delta], [projected], [state])
        return delta.neg_()

    def reproject(self, turn: Tensor, state: State, group: Group, tall: bool) -> None:
        """Carry the state from the old space to the new one.

        turn: (rank, rank) = new projector^T old projector. The first moment turns with it; the second by its squares,
        which keeps it positive and is exact for uncorrelated coordinates of mean zero (the idea: LDAdam,
        arXiv:2410.16103).
        """
        state["exp_avg"].copy_(_turned(state["exp_avg"], turn, tall))
        state["exp_avg_sq"].copy_(_turned(state["exp_avg_sq"], turn.square(), tall))

    def scale_of(self, parameter: Tensor, group: Group) -> float:
        """Factor on the direction."""
        return group["scale"]

    def step(self, group: Group, parameters: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            gradient, tall = gradient.float(), parameter.shape[0] > parameter.shape[1]
            projector = state.get("projector")
            if projector is None:
                direction = self.direction(gradient, state, group)
            else:
                offset = state["index"] * group["update_period"] // len(group["params"])
                if state["steps"] == 0 or (state["steps"] + offset) % group["update_period"] == 0:
                    self._refresh(gradient.mT if tall else gradient, state, group, tall)
                projected = gradient @ projector if tall else projector.mT @ gradient
                direction = self.direction(projected, state, group)
                direction = direction @ projector.mT if tall else projector @ direction
            state["steps"] += 1
            with in_float32(parameter) as p:
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(direction, alpha=-group["lr"] * self.scale_of(parameter, group))

    def _refresh(self, gradient: Tensor, state: State, group: Group, tall: bool) -> None:
        old: Tensor = state["projector"]
        generator = rounding_generator(state["steps"], state["index"], gradient.device)
        new = randomized_projector(gradient, old.shape[1], group["oversampling"], group["power_iterations"], generator)
        if state["steps"]:
            self.reproject(new.mT @ old, state, group, tall)
        old.copy_(new)


def _turned(state: Tensor, turn: Tensor, tall: bool) -> Tensor:
    """A state (rank x c), or (r x rank) of a tall matrix, in the new space."""
    return state @ turn.mT if tall else turn @ state


class GaLore8bit(GaLore):
    """GaLore with 8-bit AdamW inside; the projector stays float32."""

    name = "galore8bit"
    quantized = True

    class Options(GaLore.Options, Options8bit):
        """Those of GaLore and of blocks."""

    def init_inner(self, space: Tensor, group: Group, index: int) -> State:
        return adamw_state(space) if space.numel() < SMALL else adam8bit_state(space, group, index)

    def direction(self, projected: Tensor, state: State, group: Group) -> Tensor:
        if "exp_avg_absmax" not in state:
            return super().direction(projected, state, group)
        delta = torch.zeros_like(projected)
        adam8bit_step(delta, projected, state, group, lr=-1.0, decay=0.0)
        return delta

    def reproject(self, turn: Tensor, state: State, group: Group, tall: bool) -> None:
        if "exp_avg_absmax" not in state:
            super().reproject(turn, state, group, tall)
            return
        for key, code, matrix in (("exp_avg", "square", turn), ("exp_avg_sq", "quartic", turn.square())):
            _turn_codes(state, key, matrix, group, tall, code)


def _turn_codes(state: State, key: str, turn: Tensor, group: Group, tall: bool, code: str) -> None:
    codes, absmax = state[key], state[key + "_absmax"]
    value = dequantize(codes, absmax, group["block_size"], code)
    store(_turned(value, turn, tall).contiguous(), codes, absmax, group["block_size"], code)


class GaLoreMuon8bit(GaLore):
    """Muon in GaLore's space with 8-bit momentum: one state instead of two, and a cheaper orthogonalisation."""

    name = "galore-muon8bit"
    quantized = True

    class Options(ProjectionOptions, MuonOptions, Options8bit):
        """Those of the projection, of Muon and of blocks."""

        scale: float = number(1.0)

    auto = Muon.auto
    set_progress = Muon.set_progress

    def cost(self, group: Group, parameter: Tensor) -> float:
        space = (resolved_rank(group["rank"], parameter), max(parameter.shape))
        return super().cost(group, parameter) + newton_schulz_flops(space, group["ns_steps"]) / FLOPS

    def init_inner(self, space: Tensor, group: Group, index: int) -> State:
        return muon8bit_state(space, group, index)

    def direction(self, projected: Tensor, state: State, group: Group) -> Tensor:
        return muon_updates([projected], [state], group)[0]

    def scale_of(self, parameter: Tensor, group: Group) -> float:
        return group["scale"] * update_scale(parameter, group)

    def reproject(self, turn: Tensor, state: State, group: Group, tall: bool) -> None:
        if "momentum_absmax" in state:
            _turn_codes(state, "momentum", turn, group, tall, "linear")
        else:
            state["momentum"].copy_(_turned(state["momentum"], turn, tall))
