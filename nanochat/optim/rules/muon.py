"""Muon: momentum, orthogonalised by Newton-Schulz (K. Jordan, 2024), with the refinements that the recipe uses.

Refinements: Nesterov or plain momentum in sum or EMA form; row-equilibrated input; Polar Express coefficients
(arXiv:2505.16932); NorMuon's second moment of the output's rows or columns (arXiv:2510.05491); cautious weight decay
(arXiv:2510.12402); the update's scale as in the original or matched to AdamW's RMS (arXiv:2502.16982).

For hidden matrices: an embedding, the lm_head and vectors want another rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat.device import matmul_dtype
from nanochat.errors import UserError
from nanochat.optim.newton_schulz import POLAR_EXPRESS, POLAR_EXPRESS_SAFETY, newton_schulz, newton_schulz_flops
from nanochat.optim.options import choice, number, switch, whole
from nanochat.optim.quantized import (
    SMALL,
    Options8bit,
    absmax_like,
    codes_like,
    decode,
    encode,
    rounding_of,
    span_size,
    spans,
)
from nanochat.optim.rule import FLOPS, Group, Rule, State, check_matrix, in_float32, zeros_like

TINY = 1e-12
"""rows and matrices with a smaller norm count as zero"""
STACKED = 2**26
"""elements of the matrices that a GPU orthogonalises at a time: enough to fill it, little beside the model's own"""


@dataclass(frozen=True)
class MuonOptions:
    """Options of every rule that orthogonalises; plain Muon's defaults."""

    momentum: float = number(0.95, 0.0, 1.0, open_end=True)
    momentum_start: float | None = number(None, 0.0, 1.0, open_end=True)
    momentum_warmup: int = whole(0)  # steps from `momentum_start` to `momentum`
    nesterov: bool = switch(True)
    ema: bool = switch(True)
    ns_steps: int = whole(5, 1)
    newton_schulz: str = choice("classic", "polar_express")
    ns_dtype: str = choice("auto", "float32", "bfloat16", saved=True, absent="float32")
    adjust: str = choice("match_rms", "original")
    row_equilibration: bool = switch(False)
    normuon_beta: float = number(0.0, 0.0, 1.0, open_end=True)
    cautious_weight_decay: bool = switch(False)

    def __post_init__(self) -> None:
        if self.newton_schulz == "polar_express" and self.ns_steps < len(POLAR_EXPRESS):
            raise UserError(
                f"ns_steps={self.ns_steps} is too few for newton_schulz=polar_express (at least {len(POLAR_EXPRESS)}); "
                "use newton_schulz=classic for fewer steps."
            )


class Muon(Rule):
    """Muon with 32-bit momentum."""

    name = "muon"

    class Options(MuonOptions):
        """Those of Muon."""

    def auto(self, device: torch.device) -> dict[str, Any]:
        return {"ns_dtype": str(matmul_dtype(device)).removeprefix("torch.")}

    def check(self, group: Group, name: str, parameter: Tensor) -> None:
        check_matrix(group, name, parameter)

    def set_progress(self, group: Group, step: int, max_steps: float) -> None:
        warm_up_momentum(group, step)

    def cost(self, group: Group, parameter: Tensor) -> float:
        return parameter.numel() + newton_schulz_flops(parameter.shape, group["ns_steps"]) / FLOPS

    def init(self, parameter: Tensor, group: Group, index: int) -> State:
        return {"momentum": zeros_like(parameter), **variance_state(parameter, group, torch.float32)}

    def step(self, group: Group, parameters: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        for bucket in buckets(parameters):
            updates = muon_updates([gradients[i] for i in bucket], [states[i] for i in bucket], group)
            for i, update in zip(bucket, updates, strict=True):
                with in_float32(parameters[i]) as p:  # (r, c)
                    # Weight decay, only where it has the update's sign if it is cautious
                    decay = group["lr"] * group["weight_decay"]
                    if decay and group["cautious_weight_decay"]:
                        p.addcmul_(p, (p * update >= 0).float(), value=-decay)
                    elif decay:
                        p.mul_(1.0 - decay)

                    # Update
                    p.add_(update, alpha=-group["lr"] * update_scale(p, group))


def muon_updates(gradients: list[Tensor], states: list[State], group: Group) -> Tensor:
    """From gradients of one shape to orthogonal updates, all at once; momenta and second moments are updated.

    Returns float32 (n, r, c), to be scaled by `update_scale` and the rate.
    """
    rows, columns = gradients[0].shape
    x = torch.empty(len(gradients), rows, columns, dtype=torch.float32, device=gradients[0].device)

    # Momentum, with Nesterov's look-ahead
    for grad, state, out in zip(gradients, states, x, strict=True):
        update_momentum(grad, state, group, out)

    # Row equilibration: every row to the same norm; or one norm for the matrix. Singular values are at most 1 then
    if group["row_equilibration"]:
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (n, r, 1)
        x.mul_((norms > TINY) / (norms.clamp_min(TINY) * rows**0.5))
    else:
        norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)  # (n, 1, 1)
        x.div_(norms.clamp_min(TINY))
    if group["newton_schulz"] == "polar_express":
        x.div_(POLAR_EXPRESS_SAFETY)

    # Polar factor by Newton-Schulz: every singular value towards 1
    dtype = getattr(torch, group["ns_dtype"])
    x = newton_schulz(x.to(dtype), group["ns_steps"], group["newton_schulz"]).float()

    # Norm of a semi-orthogonal matrix, which few steps fall short of
    if group["row_equilibration"]:
        norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        x.mul_(min(rows, columns) ** 0.5 / norms.clamp_min(1e-6))

    # NorMuon: each row (column of a wide matrix) over the root of its mean square, the whole norm as before
    if group["normuon_beta"]:
        along = -1 if rows >= columns else -2
        mean = torch.linalg.vector_norm(x, dim=along, keepdim=True).square_().div_(x.shape[along])  # (n, r, 1)
        variance = torch.stack([state["variance"] for state in states]).float()
        variance.lerp_(mean, 1.0 - group["normuon_beta"])
        for state, one in zip(states, variance, strict=True):
            state["variance"].copy_(one)
        factor = variance.clamp_min(1e-10).rsqrt()
        before = mean.sum(dim=(-2, -1), keepdim=True).sqrt()
        after = (mean * factor.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
        x.mul_(factor * (before / after.clamp_min(1e-10)))
    return x


def update_momentum(gradient: Tensor, state: State, group: Group, out: Tensor) -> None:
    """Update one matrix' momentum, in 32 bits or from and to 8; `out` (r, c) becomes what to orthogonalise."""
    if "momentum_absmax" not in state:
        _update_momentum(state["momentum"], gradient, group, out)
        return
    state["step"] += 1
    generator = rounding_of(state, group, gradient.device)
    codes, flat_grad, flat_out = state["momentum"].view(-1), gradient.reshape(-1), out.view(-1)
    scratch = torch.empty(2, span_size(flat_grad, group["block_size"]), dtype=torch.float32, device=gradient.device)
    for elements, blocks in spans(flat_grad, group["block_size"]):
        size = elements.stop - elements.start
        absmax = state["momentum_absmax"][blocks]
        momentum = decode(codes[elements], absmax, "linear", scratch[0, :size])
        _update_momentum(momentum, flat_grad[elements], group, flat_out[elements])
        encode(momentum, codes[elements], absmax, "linear", generator, scratch[1, :size])


def _update_momentum(momentum: Tensor, gradient: Tensor, group: Group, out: Tensor) -> None:
    mu = group.get("momentum_now", group["momentum"])
    gradient = gradient.float()
    if group["ema"]:
        momentum.lerp_(gradient, 1.0 - mu)
    else:
        momentum.mul_(mu).add_(gradient)
    if not group["nesterov"]:
        out.copy_(momentum)
    elif group["ema"]:
        torch.lerp(gradient, momentum, mu, out=out)
    else:
        torch.add(gradient, momentum, alpha=mu, out=out)


def warm_up_momentum(group: Group, step: int) -> None:
    """Set `momentum_now`, linear from `momentum_start` to `momentum` over the first `momentum_warmup` steps."""
    start = group["momentum"] if group["momentum_start"] is None else group["momentum_start"]
    done = min(1.0, step / max(1, group["momentum_warmup"]))
    group["momentum_now"] = start + (group["momentum"] - start) * done


def update_scale(parameter: Tensor, group: Group) -> float:
    """Factor that makes the update's size right for the matrix' shape."""
    rows, columns = parameter.shape
    return max(1.0, rows / columns) ** 0.5 if group["adjust"] == "original" else 0.2 * max(rows, columns) ** 0.5


def variance_state(like: Tensor, group: Group, dtype: torch.dtype) -> State:
    """NorMuon's second moment: of the rows of a tall or square update, of the columns of a wide one."""
    if not group["normuon_beta"]:
        return {}
    rows, columns = like.shape
    return {"variance": torch.zeros((rows, 1) if rows >= columns else (1, columns), dtype=dtype, device=like.device)}


def muon8bit_state(like: Tensor, group: Group, index: int) -> State:
    """Momentum in the shape of a tensor, in 8 bits, or in 32 where it is small; NorMuon's second moment in bfloat16."""
    variance = variance_state(like, group, torch.bfloat16)
    if like.numel() < SMALL:
        return {"momentum": zeros_like(like), **variance}
    absmax = absmax_like(like, group["block_size"])
    return {"step": 0, "index": index, "momentum": codes_like(like), "momentum_absmax": absmax, **variance}


class Muon8bit(Muon):
    """Muon with momentum in 8 bits, linear (8-bit Muon, arXiv:2509.23106); small matrices keep 32 bits.

    NorMuon's second moment is bfloat16: at width 256 in float32 it would take 1.6% of the momentum's bytes.
    """

    name = "muon8bit"
    quantized = True

    class Options(MuonOptions, Options8bit):
        """Those of Muon and of blocks."""

    def init(self, parameter: Tensor, group: Group, index: int) -> State:
        return muon8bit_state(parameter, group, index)


def buckets(parameters: list[Tensor]) -> list[list[int]]:
    """Indices to orthogonalise together: equal shapes on a GPU, where one batched product beats many small ones;
    one by one on a CPU, where stacking gains nothing and costs memory."""
    filled: list[list[int]] = []
    newest: dict[object, list[int]] = {}
    for i, parameter in enumerate(parameters):
        key = (tuple(parameter.shape), parameter.device) if parameter.device.type != "cpu" else i
        if key not in newest or (len(newest[key]) + 1) * parameter.numel() > STACKED:
            filled.append(newest.setdefault(key, []) if key not in newest else [])
            newest[key] = filled[-1]
        newest[key].append(i)
    return filled
