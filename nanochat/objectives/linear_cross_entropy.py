"""The output matrix and the cross entropy in one, a chunk of tokens at a time: the logits never exist whole.

The forward pass already knows the gradient of the sum of the losses (softmax minus one-hot), so each chunk of logits
is turned in place into that gradient, multiplied out into the gradients of `hidden` and `weight`, and forgotten.
The backward pass only scales the two. Peak extra memory is one chunk of logits plus the two gradients, however
many tokens there are; nothing is computed twice (unlike recomputation by checkpointing, which costs 1.5x).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100
CPU_CHUNK = 256  # tokens; measured: 128 and 512 are slower
CPU_COLUMN_MAJOR = 16384  # words from which the product runs faster when its result is laid out (V, C)
KEEP_BLOCK = 2**20  # logits that are moved at a time when a chunk is packed
CUDA_CHUNK_LOGITS = 2**26  # logits of a chunk, 256 MB in float32

Selector = Callable[[Tensor], Tensor]
"""(B, T) losses of whole sequences (ignored targets: -inf) -> (B, K) sorted positions of the tokens to keep."""


class HeadGradient:
    """The gradient of the output matrix that several calls of one step share.

    It is as large as the matrix itself, so a further term of the loss had better not bring another one. The first call
    makes it and hands it to autograd; later ones add to it in their forward pass, which therefore needs their
    coefficients. The terms must then be summed as they are: each of them has the same gradient, or the backward raises.
    """

    def __init__(self) -> None:
        self.buffer: Tensor | None = None  # (V, d) float32, of the first call's sum of losses
        self.divisor = torch.ones(())  # by which the first call's backward divides it
        self.pending = 0  # later calls whose backward is to come
        self.upstream: Tensor | None = None

    def arrived(self, upstream: Tensor, later: bool) -> None:
        """Note the gradient of a call's loss; raises `RuntimeError` where the terms were not simply summed."""
        if self.upstream is not None:
            same = torch.eq(upstream, self.upstream)
            if same.is_cuda:
                torch._assert_async(same)  # type: ignore[attr-defined]  # without waiting for the device
            elif not same:
                raise RuntimeError("terms that share a HeadGradient must be summed without further factors.")
        self.upstream = upstream
        if later:
            self.pending -= 1
        elif self.pending:
            raise RuntimeError("a term that shares a HeadGradient is missing in the loss.")
        else:
            self.buffer = None  # it is autograd's now


class LinearCrossEntropy(NamedTuple):
    """What `linear_cross_entropy` returns."""

    loss: Tensor
    """scalar: coefficient x mean over the kept, valid targets, with smoothing and z-loss; 0 if there are none"""
    per_token: Tensor
    """(B, T) plain cross entropy of every token in nats, detached; 0 where the target is ignored"""
    kept: Tensor | None
    """(B, K) positions that the selector kept; None without a selector"""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    selector: Selector | None = None,
    chunk: int | None = None,
    head: HeadGradient | None = None,
    coefficient: Tensor | float = 1.0,
) -> LinearCrossEntropy:
    """Cross entropy of `softmax(hidden @ weight.T)` in chunks.

    Args:
        hidden: (B, T, d), after the final norm.
        weight: (V, d), the output matrix.
        targets: (B, T) int64; -100 is ignored.
        softcap: logits become softcap * tanh(logits / softcap); 0 is off.
        label_smoothing: share of the target's probability that is spread over the vocabulary.
        z_loss: factor of logsumexp², which keeps the logits from drifting (PaLM, arXiv:2204.02311).
        selector: picks the tokens that count, from the plain losses of whole sequences; the same number in each.
        chunk: tokens at a time; by default 256 on a CPU and as many as fill 256 MB of logits elsewhere. With a
            selector it is rounded to whole sequences.
        head: gradient of `weight` that calls share. A first call without a coefficient opens it to later ones.
        coefficient: factor on the loss.

    Under autocast the products run in its dtype; losses and the gradient of `weight` are accumulated in float32.
    The gradient exists once: a second backward through the same call raises.
    """
    batch, length, _ = hidden.shape
    if chunk is None:
        chunk = CPU_CHUNK if hidden.device.type == "cpu" else max(256, CUDA_CHUNK_LOGITS // weight.shape[0])
    if selector is not None:
        chunk = max(1, chunk // length) * length
    if not torch.is_grad_enabled():
        # inside of a Function gradients are always off: it goes by what its inputs ask for
        hidden, weight = hidden.detach(), weight.detach()
    # a call without a gradient to hidden would have no backward to answer for what it added
    later = head is not None and head.buffer is not None and hidden.requires_grad
    assert selector is None or not later, "only the first call of a step selects"
    if later:
        weight = weight.detach()  # its gradient goes the first call's way
    options = _Options(softcap, label_smoothing, z_loss, chunk, selector, (batch, length), head, later, coefficient)
    loss, per_token, kept = _LinearCrossEntropy.apply(hidden.flatten(0, 1), weight, targets.flatten(), options)  # type: ignore[misc]
    return LinearCrossEntropy(loss, per_token.view(batch, length), kept)


class _Options(NamedTuple):
    softcap: float
    label_smoothing: float
    z_loss: float
    chunk: int
    selector: Selector | None
    shape: tuple[int, int]
    head: HeadGradient | None
    later: bool
    """another call has opened `head`"""
    coefficient: Tensor | float


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, options: _Options):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        x, w = hidden.to(dtype), weight.to(dtype)  # (N, d), (V, d)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(x) if needs_hidden else None
        head, coefficient = options.head, options.coefficient
        factor: Tensor | float = 1.0  # of the rows' gradients
        if options.later:
            assert head is not None
            grad_weight = head.buffer
            factor = coefficient * head.divisor / (targets != IGNORED).sum().clamp_min(1)
        else:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        per_token = hidden.new_zeros(x.shape[0], dtype=torch.float32)
        total = hidden.new_zeros((), dtype=torch.float32)
        count = hidden.new_zeros((), dtype=torch.float32)
        kept: list[Tensor] = []
        buffer = x.new_empty(min(options.chunk, x.shape[0]) * w.shape[0])
        for start in range(0, x.shape[0], options.chunk):
            rows = slice(start, min(start + options.chunk, x.shape[0]))
            xc, target = x[rows], targets[rows]
            logits = _logits(xc, w, buffer)  # (C, V)
            chunk = _Chunk(logits, target, options)
            per_token[rows] = chunk.plain
            index = None
            if options.selector is not None:
                index, positions = _select(chunk, options)
                kept.append(positions)
                chunk.keep(index)
            total += chunk.losses.sum()
            count += chunk.valid.sum()
            if grad_hidden is None and grad_weight is None:
                continue
            gradient = chunk.gradient(factor).to(dtype)  # (C', V)
            if grad_hidden is not None:
                if index is None:
                    torch.mm(gradient, w, out=grad_hidden[rows])
                else:
                    grad_hidden[rows].index_copy_(0, index, gradient @ w)
            if grad_weight is not None:
                xk = xc if index is None else xc[index]
                if dtype == torch.float32:
                    grad_weight.addmm_(gradient.t(), xk)
                else:
                    grad_weight += gradient.t() @ xk
        count.clamp_min_(1.0)
        ctx.gradients = (grad_hidden, grad_weight if needs_weight else None)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.head, ctx.later, ctx.scale = None, options.later, coefficient / count
        if options.later:
            assert head is not None
            ctx.head, ctx.scale = head, 1.0 / head.divisor  # the factor is in the rows
            head.pending += 1
        elif head is not None and needs_weight and isinstance(coefficient, float) and coefficient == 1.0:
            ctx.head, head.buffer, head.divisor = head, grad_weight, count
        positions = torch.cat(kept) if kept else None
        ctx.mark_non_differentiable(per_token, *([] if positions is None else [positions]))
        return total * (coefficient / count), per_token, positions

    @staticmethod
    def backward(ctx, upstream: Tensor, *_):  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy keeps its gradient once: call backward a single time.")
        if ctx.head is not None:
            ctx.head.arrived(upstream, ctx.later)
        scale = upstream * ctx.scale
        gradients = [
            None if g is None else g.mul_(scale).to(dtype) for g, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return gradients[0], gradients[1], None, None


def _logits(x: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """x (C, d) @ weight.T (d, V) -> (C, V), in the buffer."""
    vocabulary, rows = weight.shape[0], x.shape[0]
    memory = buffer[: rows * vocabulary]
    if x.device.type == "cpu" and vocabulary >= CPU_COLUMN_MAJOR:
        return torch.mm(weight, x.t(), out=memory.view(vocabulary, rows)).t()
    return torch.mm(x, weight.t(), out=memory.view(rows, vocabulary))


def _keep_in_place(x: Tensor, index: Tensor) -> Tensor:
    """x[index], index sorted and without repeats, packed into the front of x's own memory.

    A copy as large as most of the chunk costs more to allocate than to write. Rows move towards the front only, so a
    block that is read whole before it is written overwrites nothing that is still to be read.
    """
    by_rows = x.is_contiguous()
    source = x if by_rows else x.t()  # (C, V) or (V, C), in memory order
    shape = (len(index), x.shape[1]) if by_rows else (x.shape[1], len(index))
    packed = source.flatten()[: shape[0] * shape[1]].view(shape)
    step = max(1, KEEP_BLOCK // source.shape[1])
    for start in range(0, shape[0], step):
        rows = slice(start, start + step)
        packed[rows] = source[index[rows]] if by_rows else source[rows].index_select(1, index)
    return packed if by_rows else packed.t()


def _select(chunk: _Chunk, options: _Options) -> tuple[Tensor, Tensor]:
    """Rows of the chunk to keep (K',), and their positions in their sequences (B', K)."""
    length = options.shape[1]
    scores = chunk.plain.masked_fill(~chunk.valid, -torch.inf).view(-1, length)  # (B', T)
    positions = options.selector(scores)  # type: ignore[misc]  # (B', K)
    offsets = torch.arange(scores.shape[0], device=positions.device)[:, None] * length
    return (positions + offsets).flatten(), positions


class _Chunk:
    """A chunk of logits that turns, in place, into its losses and then into the gradient of their sum."""

    def __init__(self, logits: Tensor, targets: Tensor, options: _Options) -> None:
        self.options = options
        self.valid = targets != IGNORED  # (C,)
        self.target = targets.clamp_min(0)[:, None]  # (C, 1)
        work = logits if logits.dtype == torch.float32 else logits.float()  # (C, V)
        if options.softcap:
            work.div_(options.softcap).tanh_()
            self.slope = 1.0 - work.square()
            work.mul_(options.softcap)
        maximum = work.amax(-1, keepdim=True)
        target_logit = work.gather(1, self.target)
        mean_logit = work.mean(-1, keepdim=True) if options.label_smoothing else None
        self.sum = work.sub_(maximum).exp_().sum(-1, keepdim=True)
        self.lse = self.sum.log() + maximum  # (C, 1)
        plain = self.lse - target_logit
        losses = plain
        if mean_logit is not None:
            losses = torch.lerp(plain, self.lse - mean_logit, options.label_smoothing)
        if options.z_loss:
            losses = losses + options.z_loss * self.lse.square()
        self.exp = work
        self.plain = (plain[:, 0]).masked_fill(~self.valid, 0.0)  # (C,)
        self.losses = losses[:, 0].masked_fill(~self.valid, 0.0)

    def keep(self, index: Tensor) -> None:
        """Go on with these rows only."""
        for name in ("valid", "target", "sum", "lse", "losses"):
            setattr(self, name, getattr(self, name)[index])
        self.exp = _keep_in_place(self.exp, index)
        if self.options.softcap:
            self.slope = _keep_in_place(self.slope, index)

    def gradient(self, scale: Tensor | float = 1.0) -> Tensor:
        """(C, V): scale x d sum(losses) / d logits; consumes the chunk."""
        options = self.options
        valid = self.valid[:, None].float() * scale
        factor = 1.0 + 2.0 * options.z_loss * self.lse if options.z_loss else 1.0
        gradient = self.exp.mul_(valid * factor / self.sum)
        if options.label_smoothing:
            gradient.sub_(valid * (options.label_smoothing / gradient.shape[1]))
        gradient.scatter_add_(1, self.target, -(1.0 - options.label_smoothing) * valid)
        if options.softcap:
            gradient.mul_(self.slope)
        return gradient
