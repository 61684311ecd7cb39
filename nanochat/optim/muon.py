"""Muon: momentum, orthogonalised by Newton-Schulz (K. Jordan, 2024), with the refinements that the recipe uses.

Refinements: Nesterov or plain momentum in sum or EMA form; row-equilibrated input; Polar Express coefficients
(arXiv:2505.16932); NorMuon's second moment of the output's rows or columns (arXiv:2510.05491); cautious weight decay
(arXiv:2510.12402); the update's scale as in the original or matched to AdamW's RMS (arXiv:2502.16982).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.optim.quantized import (
    BLOCK,
    SMALL,
    absmax_like,
    codes_like,
    decode,
    encode,
    rounding_generator,
    span_size,
    spans,
)
from nanochat.optim.rule import Group, Rule, State, check_matrix

CLASSIC = (3.4445, -4.7750, 2.0315)
"""Each step maps a singular value s to a s + b s^3 + c s^5: 5 steps take [.01, 1] to .68-1.13, 3 steps to .40-1.20."""
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""One triple a step, the last one repeated; its first three alone leave singular values between .16 and 1.87."""
POLAR_EXPRESS_SAFETY = 1.02
"""the coefficients were computed for singular values up to 1 / 1.02"""
TINY = 1e-12
"""rows and matrices with a smaller norm count as zero"""


def newton_schulz(x: Tensor, steps: int, kind: str = "classic") -> Tensor:
    """Push the singular values of x (..., r, c), which must be at most 1, towards 1; x is overwritten.

    Works on the Gram matrix of the shorter side, in x's own dtype; 3-D input is one chain of batched products.
    """
    triples = [CLASSIC] * steps if kind == "classic" else list(POLAR_EXPRESS[:steps])
    triples += [POLAR_EXPRESS[-1]] * (steps - len(triples))
    tall = x.shape[-2] > x.shape[-1]
    multiply, add_product = (torch.mm, torch.addmm) if x.ndim == 2 else (torch.bmm, torch.baddbmm)
    side = min(x.shape[-2:])
    gram, polynomial = x.new_empty(*x.shape[:-2], side, side), x.new_empty(*x.shape[:-2], side, side)
    other = torch.empty_like(x, memory_format=torch.contiguous_format)
    for a, b, c in triples:
        multiply(*((x.mT, x) if tall else (x, x.mT)), out=gram)
        add_product(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        add_product(x, *((x, polynomial) if tall else (polynomial, x)), beta=a, out=other)
        x, other = other, x
    return x


def orthogonalized(update: Tensor, group: Group, variance: Tensor | None) -> Tensor:
    """The direction of a Muon step from its momentum, float32.

    update: (..., r, c) float32, overwritten; variance: NorMuon's second moment (..., r, 1) or (..., 1, c), updated.
    """
    rows, columns = update.shape[-2:]
    if group["row_equilibration"]:
        norms = torch.linalg.vector_norm(update, dim=-1, keepdim=True)  # (..., r, 1)
        update.mul_((norms > TINY) / (norms.clamp_min(TINY) * rows**0.5))
    else:
        norms = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
        update.div_(norms.clamp_min(TINY))
    if group["newton_schulz"] == "polar_express":
        update.div_(POLAR_EXPRESS_SAFETY)
    # bfloat16 halves the time on tensor cores and triples it on a CPU
    x = update.bfloat16() if update.is_cuda else update
    x = newton_schulz(x, group["ns_steps"], group["newton_schulz"]).float()
    if group["row_equilibration"]:
        norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        x.mul_(min(rows, columns) ** 0.5 / norms.clamp_min(1e-6))
    if variance is not None:
        reduced = -1 if rows >= columns else -2
        mean = torch.linalg.vector_norm(x, dim=reduced, keepdim=True).square_().div_(x.shape[reduced])
        following = variance.float().lerp_(mean, 1.0 - group["normuon_beta"])
        variance.copy_(following)
        factor = following.clamp_min(1e-10).rsqrt()
        before = mean.sum(dim=(-2, -1), keepdim=True).sqrt()
        after = (mean * factor.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
        x.mul_(factor * (before / after.clamp_min(1e-10)))
    return x


def momentum_update(momentum: Tensor, gradient: Tensor, group: Group, out: Tensor | None = None) -> Tensor:
    """Move the momentum (float32, in place) by the gradient; returns what to orthogonalise (`out` if given)."""
    mu = group["momentum_now"]
    gradient = gradient.float()
    if group["ema"]:
        momentum.lerp_(gradient, 1.0 - mu)
    else:
        momentum.mul_(mu).add_(gradient)
    if not group["nesterov"]:
        return momentum.clone() if out is None else out.copy_(momentum)
    if group["ema"]:
        return torch.lerp(gradient, momentum, mu, out=out)
    return torch.add(gradient, momentum, alpha=mu, out=out)


def update_scale(parameter: Tensor, group: Group) -> float:
    """Factor that makes the update's size right for the matrix' shape."""
    rows, columns = parameter.shape
    return max(1.0, rows / columns) ** 0.5 if group["adjust"] == "original" else 0.2 * max(rows, columns) ** 0.5


def apply_update(parameter: Tensor, update: Tensor, group: Group) -> None:
    """p <- p (1 - lr wd) - lr scale update, the decay only where it agrees with the update if it is cautious."""
    decay = group["lr"] * group["weight_decay"]
    wide = parameter.float()
    if decay and group["cautious_weight_decay"]:
        wide.addcmul_(wide, (wide * update >= 0).float(), value=-decay)
    elif decay:
        wide.mul_(1.0 - decay)
    wide.add_(update, alpha=-group["lr"] * update_scale(parameter, group))
    if wide is not parameter:
        parameter.copy_(wide)


def variance_state(shape: torch.Size, group: Group, device: torch.device, dtype: torch.dtype = torch.float32) -> State:
    """NorMuon's second moment: of the rows of a tall or square update, of the columns of a wide one."""
    if not group["normuon_beta"]:
        return {}
    rows, columns = shape
    return {"variance": torch.zeros((rows, 1) if rows >= columns else (1, columns), dtype=dtype, device=device)}


def check_muon(group: Group, name: str, parameter: Tensor) -> None:
    """Raise `UserError` for a parameter that is no matrix, and for Polar Express cut short."""
    check_matrix(group, name, parameter)
    if group["newton_schulz"] == "polar_express" and group["ns_steps"] < len(POLAR_EXPRESS):
        raise UserError(
            f"ns_steps={group['ns_steps']} is too few for newton_schulz=polar_express (at least {len(POLAR_EXPRESS)}); "
            "use newton_schulz=classic for fewer steps."
        )


MUON_OPTIONS = {
    "momentum": 0.95,
    "momentum_start": None,
    "momentum_warmup": 0,
    "nesterov": True,
    "ema": True,
    "ns_steps": 5,
    "newton_schulz": "classic",
    "adjust": "match_rms",
    "row_equilibration": False,
    "normuon_beta": 0.0,
    "cautious_weight_decay": False,
}


class Muon(Rule):
    """Muon with 32-bit momentum."""

    name = "muon"
    options: ClassVar = MUON_OPTIONS

    def check(self, group: Group, name: str, parameter: Tensor) -> None:
        check_muon(group, name, parameter)

    def init(self, parameter: Tensor, group: Group, index: int) -> State:
        momentum = torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)
        return {"momentum": momentum, **variance_state(parameter.shape, group, parameter.device)}

    def update(self, state: State, gradient: Tensor, group: Group) -> Tensor:
        """Move one parameter's momentum; returns what is to be orthogonalised (r, c), float32."""
        return momentum_update(state["momentum"], gradient, group)

    def step(self, group: Group, parameters: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        for bucket in buckets(parameters):
            updates = [self.update(states[i], gradients[i], group) for i in bucket]
            variances = [states[i]["variance"] for i in bucket] if group["normuon_beta"] else None
            if len(bucket) == 1:
                moves = [orthogonalized(updates[0], group, None if variances is None else variances[0])]
            else:
                variance = None if variances is None else torch.stack(variances)
                moves = list(orthogonalized(torch.stack(updates), group, variance).unbind())
                if variances is not None:
                    torch._foreach_copy_(variances, list(variance.unbind()))  # type: ignore[union-attr]
            for i, move in zip(bucket, moves, strict=True):
                apply_update(parameters[i], move, group)


class Muon8bit(Muon):
    """Muon with momentum in 8 bits, linear (8-bit Muon, arXiv:2509.23106); small matrices keep 32 bits.

    NorMuon's second moment is bfloat16: at width 256 in float32 it would take 1.6% of the momentum's bytes.
    """

    name = "muon8bit"
    options: ClassVar = {**MUON_OPTIONS, "block_size": BLOCK, "stochastic_rounding": False}
    quantized = True

    def init(self, parameter: Tensor, group: Group, index: int) -> State:
        variance = variance_state(parameter.shape, group, parameter.device, torch.bfloat16)
        return {**momentum8bit_state(parameter, group, index), **variance}

    def update(self, state: State, gradient: Tensor, group: Group) -> Tensor:
        return momentum8bit_update(state, gradient, group)


def momentum8bit_state(like: Tensor, group: Group, index: int) -> State:
    """Momentum in the shape of a tensor: 8 bits, or 32 where it is small."""
    if like.numel() < SMALL:
        return {"momentum": torch.zeros_like(like, dtype=torch.float32, memory_format=torch.contiguous_format)}
    absmax = absmax_like(like, group["block_size"])
    return {"step": 0, "index": index, "momentum": codes_like(like), "momentum_absmax": absmax}


def momentum8bit_update(state: State, gradient: Tensor, group: Group) -> Tensor:
    """`momentum_update` on a momentum that is 8 bits outside of this function."""
    if "momentum_absmax" not in state:
        return momentum_update(state["momentum"], gradient, group)
    state["step"] += 1
    generator = None
    if group["stochastic_rounding"]:
        generator = rounding_generator(state["step"], state["index"], gradient.device)
    codes, slope = state["momentum"].view(-1), gradient.reshape(-1)
    update = torch.empty(slope.shape, dtype=torch.float32, device=slope.device)
    scratch = torch.empty(2, span_size(slope, group["block_size"]), dtype=torch.float32, device=slope.device)
    for elements, blocks in spans(slope, group["block_size"]):
        size = elements.stop - elements.start
        absmax, following = state["momentum_absmax"][blocks], update[elements]
        momentum = decode(codes[elements], absmax, "linear", scratch[0, :size])
        momentum_update(momentum, slope[elements], group, out=following)
        encode(momentum, codes[elements], absmax, "linear", generator, scratch[1, :size])
    return update.view(gradient.shape)


def buckets(parameters: list[Tensor]) -> list[list[int]]:
    """Indices to orthogonalise together: equal shapes on a GPU, where one batched product beats many small ones;
    one by one on a CPU, where stacking gains nothing and costs memory."""
    together: dict[object, list[int]] = {}
    for i, parameter in enumerate(parameters):
        key = (tuple(parameter.shape), parameter.device) if parameter.is_cuda else i
        together.setdefault(key, []).append(i)
    return list(together.values())
