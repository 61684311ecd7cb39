"""Newton-Schulz: the polar factor of a matrix by products alone (K. Jordan, 2024; Polar Express, arXiv:2505.16932)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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


def newton_schulz_flops(shape: Sequence[int], steps: int) -> float:
    """FLOPs for a matrix: in each step two products of a square of the shorter side with it, and one of two squares."""
    short, long = sorted(shape[-2:])
    return steps * (4.0 * short * short * long + 2.0 * short**3)


def newton_schulz(x: Tensor, steps: int, kind: str = "classic") -> Tensor:
    """Push the singular values of x (..., r, c), which must be at most 1, towards 1; x is overwritten.

    Works on the Gram matrix of the shorter side, in x's own dtype; 3-D input is one chain of batched products.
    """
    if x.ndim == 3 and len(x) == 1:  # a plain product is faster on a CPU than a batch of one
        return newton_schulz(x[0], steps, kind)[None]
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
