"""Weights that are kept in bfloat16: the matrices of the blocks and of objectives, the tables, and the lm_head.

Half of their memory and of their gradients'. The residual stream and vectors such as the gains of norms stay in
float32, and so does the arithmetic: a product reads such a weight as it reads any other (see `nanochat.optim.rounding`
for how an update gets into it).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.model.bitlinear import BitLinear


def keep_in_bfloat16(module: nn.Module) -> None:
    """Round the large weights below a module to bfloat16, which replaces its parameters."""
    for name, child in module.named_modules():
        if isinstance(child, BitLinear) or name.endswith(("gpt.embedding", "gpt.value_embedding", "gpt.head")):
            old = child.weight
            child.weight = nn.Parameter(old.detach().to(torch.bfloat16), requires_grad=old.requires_grad)  # type: ignore[arg-type]


class _Lookup(torch.autograd.Function):
    """Rows of a table in a wider dtype; their gradient is added up in it, as that of a table in float32 is."""

    @staticmethod
    def forward(ctx, weight: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
        return F.embedding(tokens, weight).to(dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        (tokens,) = ctx.saved_tensors
        # many small contributions to a frequent token would be lost in bfloat16
        total = torch.ops.aten.embedding_dense_backward(gradient, tokens, ctx.rows, -1, False)
        return total.to(ctx.dtype), None, None


def look_up(table: nn.Embedding, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """tokens (B, T) -> their rows (B, T, d), in a dtype that the table may be narrower than."""
    if table.weight.dtype.itemsize >= dtype.itemsize:
        return table(tokens)
    return _Lookup.apply(table.weight, tokens, dtype)  # type: ignore[return-value]
