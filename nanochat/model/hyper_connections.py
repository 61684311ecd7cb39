"""Residual streams (manifold-constrained hyper-connections in their light form, mHC-lite, arXiv:2601.05732).

n streams of the residual's width run through all blocks. Each sub-layer F reads a weighted sum of them and writes to
all of them, and they are mixed by a doubly stochastic matrix:

    u  = sum_s pre[s] X[s]              pre  = sigmoid(.), one weight a stream
    X' = res @ X + post[:, None] F(u)   post = 2 sigmoid(.)
                                        res  = sum_k softmax(.)[k] P_k over the n! permutation matrices P_k

A convex combination of permutations is doubly stochastic without iterating (Birkhoff-von Neumann), so the mean of
the streams is a plain residual stream with a learned gain, and no product of the mixing matrices can grow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations

import torch
from torch import Tensor, nn

READ_SHARE = 0.7  # of a sub-layer's own stream in what it reads at the start; the others share the rest
WRITE_GAIN = 1.5  # into its own stream at the start; the mean over the streams is 1
OTHER_PERMUTATION = -8.0  # logit of each permutation but the identity, whose logit is 0
DYNAMIC_SCALE = 0.01  # initial factor of the input-dependent part


def permutation_table(streams: int) -> Tensor:
    """(n!, n * n): every n x n permutation matrix as a row, in lexicographic order (the identity first)."""
    table = torch.zeros(math.factorial(streams), streams, streams)
    for index, permutation in enumerate(permutations(range(streams))):
        table[index, torch.arange(streams), torch.tensor(permutation)] = 1.0
    return table.flatten(1)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


class HyperConnection(nn.Module):
    """The maps of one sub-layer.

    Args:
        streams: n, at least 2.
        dim: width of a stream.
        index: number of the sub-layer in the network. At the start it reads and writes mainly stream index mod n:
            streams that were treated alike would stay equal for ever, and their maps without gradient.
        dynamic: the maps depend on the input: `logits = bias + gate * (phi @ rms_norm(all streams))`.
    """

    table: Tensor

    def __init__(self, streams: int, dim: int, index: int, dynamic: bool = False) -> None:
        super().__init__()
        self.streams, self.own = streams, index % streams
        orders = math.factorial(streams)
        self.res = nn.Parameter(torch.empty(orders))
        self.pre = nn.Parameter(torch.empty(streams))
        self.post = nn.Parameter(torch.empty(streams))
        self.phi = nn.Parameter(torch.empty(orders + 2 * streams, streams * dim)) if dynamic else None
        self.gate = nn.Parameter(torch.empty(3)) if dynamic else None
        self.register_buffer("table", permutation_table(streams), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initial maps: nothing is drawn, so that they change no other parameter's initial value."""
        n, own = self.streams, self.own
        self.res.fill_(OTHER_PERMUTATION)[0] = 0.0
        self.pre.fill_(_logit((1 - READ_SHARE) / (n - 1)))[own] = _logit(READ_SHARE)
        self.post.fill_(_logit((n - WRITE_GAIN) / (n - 1) / 2))[own] = _logit(WRITE_GAIN / 2)
        if self.phi is not None and self.gate is not None:
            self.phi.zero_()
            self.gate.fill_(DYNAMIC_SCALE)

    def reset_table(self, device: torch.device) -> None:
        """Make the constant table anew, for a module that was built on the meta device."""
        self.table = permutation_table(self.streams).to(device)

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (n, B, T, d); returns pre (..., n), post (..., n) and res (..., n, n), with ... = (B, T) when dynamic
        and nothing when static; in float32, or in float64 when x is.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        pre, post, res = self.pre.to(wide), self.post.to(wide), self.res.to(wide)
        if self.phi is not None and self.gate is not None:
            n, orders = self.streams, len(res)
            flat = x.movedim(0, -2).flatten(-2).to(wide)  # (B, T, n d)
            flat = nn.functional.rms_norm(flat, flat.shape[-1:], eps=1e-6)
            change = nn.functional.linear(flat, self.phi.to(wide))  # (B, T, n! + 2n)
            gate = self.gate.to(wide)
            res = res + gate[0] * change[..., :orders]
            pre = pre + gate[1] * change[..., orders : orders + n]
            post = post + gate[2] * change[..., orders + n :]
        mixing = (res.softmax(-1) @ self.table.to(wide)).unflatten(-1, (self.streams, self.streams))
        return pre.sigmoid(), 2 * post.sigmoid(), mixing

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """x: (n, B, T, d); sublayer: (B, T, d) -> (B, T, d), without the residual; returns the streams after it."""
        # in full precision also under autocast, as the additions of a plain residual stream are
        with torch.autocast(x.device.type, enabled=False):
            pre, post, res = (m.to(x.dtype) for m in self.maps(x))
            if self.phi is None:
                streams = x.flatten(1)  # (n, B T d)
                u = (pre @ streams).view(x.shape[1:])
            else:
                u = torch.einsum("bts,sbtd->btd", pre, x)
        y = sublayer(u)
        with torch.autocast(x.device.type, enabled=False):
            y = y.to(x.dtype)
            if self.phi is None:
                return torch.addmm(torch.outer(post, y.flatten()), res, streams).view_as(x)
            return torch.einsum("btrs,sbtd->rbtd", res, x) + torch.einsum("bts,btd->sbtd", post, y)

    def extra_repr(self) -> str:
        return f"{self.streams} streams, {'dynamic' if self.phi is not None else 'static'}"


def expand(x: Tensor, streams: int) -> Tensor:
    """(B, T, d) -> (n, B, T, d): every stream begins as the embedding."""
    return x.expand(streams, *x.shape)


def reduce(x: Tensor) -> Tensor:
    """(n, B, T, d) -> (B, T, d): the mean of the streams."""
    return x.mean(0)
