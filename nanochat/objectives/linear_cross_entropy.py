"""The output matrix and the cross entropy in one, a chunk of tokens at a time: the logits never exist whole.

The forward pass already knows the gradient of the sum of the losses (softmax minus one-hot), so each chunk of logits
is multiplied out into the gradients of `hidden` and `weight`, and forgotten. The backward pass only scales the two.
Peak extra memory is one chunk of logits plus the two gradients, however many tokens there are; nothing is computed
twice (unlike recomputation by checkpointing, which costs 1.5x).

A chunk holds E = exp(logits - maximum), written over the logits in one pass, a block that fits the cache at a time.
The softmax is diag(1 / sum) E, and whatever scales a row is applied to the smaller operands of the two products:

    dX = diag(a) (E W) + diag(c) W[target]          a = 1 / sum
    dW = E^T (diag(a) X), += diag(c) X at target    c = softmax of the target - 1

with the target's own entry of E set to zero: c is taken in float32, so a confident prediction keeps its digits in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat.model.autocast import product_dtype

IGNORED = -100
CPU_CHUNK = 256  # tokens; measured in float32: 128 and 512 are slower
CPU_CHUNK_BYTES = 2**24  # of a chunk in bf16, which would otherwise leave the last-level cache
CPU_COLUMN_MAJOR = 16384  # vocabulary size above which the product is faster when its result is laid out (V, C)
CPU_BLOCK = 2**17  # logits that are turned into exponentials at a time: 512 KB in float32, an L2 cache
KEEP_BLOCK = 2**20  # logits that are moved at a time when a chunk is packed
CUDA_CHUNK_LOGITS = 2**26  # logits of a chunk, 256 MB in float32
GRADIENT_BLOCK = 2**23  # numbers of the matrix' gradient that a product in bf16 makes at a time

Selector = Callable[[Tensor], "Tensor | tuple[Tensor, Tensor]"]
"""(B, T) scores of whole sequences (ignored targets: -inf) -> (B, K) sorted positions of the tokens to keep.

The scores are the plain losses, or, where the selector has a true attribute `by_gradient`, the norms of softmax minus
one-hot. A selector may return (positions, row weights), (B, K) each: then the loss is the weighted sum over the kept
tokens divided by the number of *all* valid targets, which row weights 1 / probability make unbiased.
"""


def chunk_size(vocabulary: int, device: torch.device, dtype: torch.dtype) -> int:
    """Tokens whose logits exist at a time, where nothing else is asked for."""
    if device.type != "cpu":
        return max(256, CUDA_CHUNK_LOGITS // vocabulary)
    if dtype == torch.float32:
        return CPU_CHUNK
    return 256 if 256 * vocabulary * dtype.itemsize <= CPU_CHUNK_BYTES else 128


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
    row_weights: Tensor | None = None,
    chunk: int | None = None,
    head: HeadGradient | None = None,
    coefficient: Tensor | float = 1.0,
    share: Callable[[Tensor], Tensor] | None = None,
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
        row_weights: (B, T) factor of each token's loss; the divisor stays the number of valid targets.
        chunk: tokens at a time; by default `chunk_size`. With a selector it is rounded to whole sequences.
        head: gradient of `weight` that calls share. A first call without a coefficient opens it to later ones.
        coefficient: factor on the loss.
        share: turns the number of valid targets here into this rank's share of that of all ranks, see `nanochat.ranks`.

    Under autocast the products run in its dtype; losses and the gradient of `weight` are accumulated in float32.
    The gradient exists once: a second backward through the same call raises.
    """
    batch, length, _ = hidden.shape
    if chunk is None:
        chunk = chunk_size(weight.shape[0], hidden.device, product_dtype(hidden))
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
    options = _Options(
        softcap, label_smoothing, z_loss, chunk, selector, row_weights, (batch, length), head, later, coefficient, share
    )
    loss, per_token, kept = _LinearCrossEntropy.apply(hidden.flatten(0, 1), weight, targets.flatten(), options)  # type: ignore[misc]
    return LinearCrossEntropy(loss, per_token.view(batch, length), kept)


class _Options(NamedTuple):
    softcap: float
    label_smoothing: float
    z_loss: float
    chunk: int
    selector: Selector | None
    row_weights: Tensor | None
    shape: tuple[int, int]
    head: HeadGradient | None
    later: bool
    """another call has opened `head`"""
    coefficient: Tensor | float
    share: Callable[[Tensor], Tensor] | None

    def divisor(self, valid: Tensor) -> Tensor:
        """What the sum of the losses is divided by: the valid targets, at least one."""
        return valid.clamp_min(1) if self.share is None else self.share(valid)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, options: _Options):
        dtype, wide = product_dtype(hidden), torch.promote_types(weight.dtype, torch.float32)
        x, w = hidden.to(dtype), weight.to(dtype)  # (N, d), (V, d)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        head, coefficient = options.head, options.coefficient
        factor: Tensor | float = 1.0  # of the rows' gradients
        if options.later:
            assert head is not None
            grad_weight = head.buffer
            factor = coefficient * head.divisor / options.divisor((targets != IGNORED).sum())
        else:
            grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        per_token = hidden.new_zeros(x.shape[0], dtype=torch.float32)
        total = hidden.new_zeros((), dtype=torch.float32)
        count = hidden.new_zeros((), dtype=torch.float32)
        kept: list[Tensor] = []
        buffer = x.new_empty(min(options.chunk, x.shape[0]) * w.shape[0])
        for start in range(0, x.shape[0], options.chunk):
            rows = slice(start, min(start + options.chunk, x.shape[0]))
            xc, target = x[rows], targets[rows]
            chunk = _Chunk(_logits(xc, w, buffer), target, options)
            per_token[rows] = chunk.plain
            if options.row_weights is not None:
                chunk.row_weights = options.row_weights.reshape(-1, 1)[rows].float()
            index = None
            valid = chunk.valid.sum()
            if options.selector is not None:
                index, positions, row_weights = _select(chunk, options)
                kept.append(positions)
                chunk.keep(index)
                if row_weights is None:
                    valid = chunk.valid.sum()
                else:
                    chunk.row_weights = row_weights
            total += chunk.total()
            count += valid
            if grad_hidden is None and grad_weight is None:
                continue
            scale, own = chunk.gradient(factor)  # (C', 1) each
            if grad_hidden is not None:
                gradient = torch.mm(chunk.exp, w) * scale  # (C', d)
                gradient.addcmul_(w[chunk.target[:, 0]], own)
                if index is None:
                    grad_hidden[rows] = gradient
                else:
                    grad_hidden[rows].index_copy_(0, index, gradient.to(grad_hidden.dtype))
            if grad_weight is not None:
                xk = xc if index is None else xc[index]
                scaled = (xk * scale).to(dtype)
                _add_product(grad_weight, chunk.exp.t(), scaled)
                grad_weight.index_add_(0, chunk.target[:, 0], (xk * own).to(wide))
        count = options.divisor(count)
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


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (V, d) float32 += a (V, C) @ b (C, d).

    A product of another dtype cannot be added up in float32 by the product itself; some rows at a time it is never
    there whole, which would take half as much memory as the gradient.
    """
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    step = max(1, GRADIENT_BLOCK // total.shape[1])
    for start in range(0, total.shape[0], step):
        total[start : start + step].add_(a[start : start + step] @ b)


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


def _select(chunk: _Chunk, options: _Options) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of the chunk to keep (K',), their positions in their sequences (B', K), and their weights (K', 1)."""
    assert options.selector is not None
    length = options.shape[1]
    scores = chunk.plain if chunk.norms is None else chunk.norms
    scores = scores.masked_fill(~chunk.valid, -torch.inf).view(-1, length)  # (B', T)
    choice = options.selector(scores)
    positions, row_weights = choice if isinstance(choice, tuple) else (choice, None)  # (B', K)
    offsets = torch.arange(scores.shape[0], device=positions.device)[:, None] * length
    index = (positions + offsets).flatten()
    return index, positions, None if row_weights is None else row_weights.reshape(-1, 1).to(scores.dtype)


class _Chunk:
    """A chunk of logits, turned in place into their exponentials, and what its losses and gradients are made of."""

    def __init__(self, logits: Tensor, targets: Tensor, options: _Options) -> None:
        self.options, cap = options, options.softcap
        self.valid = targets != IGNORED  # (C,)
        self.target = targets.clamp_min(0)[:, None]  # (C, 1)
        self.row_weights: Tensor | None = None  # (C, 1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        maximum, target = logits.amax(-1, keepdim=True).to(wide), logits.gather(1, self.target).to(wide)
        if cap:
            maximum, target = cap * (maximum / cap).tanh(), cap * (target / cap).tanh()
        self.own_slope = 1.0 - (target / cap).square() if cap else 1.0
        # of every logit: only smoothing needs it apart from the exponentials
        self.slope = torch.empty_like(logits) if cap and options.label_smoothing else None
        self.sum = torch.zeros_like(maximum)
        self.exp = logits
        means, squares = torch.zeros_like(maximum), torch.zeros_like(maximum)
        by_gradient = getattr(options.selector, "by_gradient", False)
        parts = _blocks(logits)
        spare = None if logits.dtype == wide else torch.empty_like(logits[parts[0]], dtype=wide)
        for rows, columns in parts:
            block, top = logits[rows, columns], maximum[rows]
            work = block if spare is None else spare[: block.shape[0], : block.shape[1]].copy_(block)
            if options.label_smoothing and not cap:
                means[rows] += work.sum(-1, keepdim=True) / logits.shape[1]
            if cap:
                work.div_(cap).tanh_()
                slope = 1.0 - work.square()
                if options.label_smoothing:
                    means[rows] += work.sum(-1, keepdim=True) * (cap / logits.shape[1])
                work.mul_(cap)
            work.sub_(top).exp_()
            self.sum[rows] += work.sum(-1, keepdim=True)
            if by_gradient:
                squares[rows] += torch.linalg.vector_norm(work, dim=-1, keepdim=True).square_()
            if self.slope is not None:
                self.slope[rows, columns] = slope
            elif cap:
                work.mul_(slope)
            if spare is not None:
                block.copy_(work)
        self.lse = self.sum.log() + maximum  # (C, 1)
        plain = self.lse - target
        self.own = (target - maximum).exp_() / self.sum  # softmax of the target
        losses = torch.lerp(plain, self.lse - means, options.label_smoothing) if options.label_smoothing else plain
        if options.z_loss:
            losses = losses + options.z_loss * self.lse.square()
        self.plain = plain[:, 0].masked_fill(~self.valid, 0.0)  # (C,)
        self.losses = losses[:, 0].masked_fill(~self.valid, 0.0)
        self.norms: Tensor | None = None
        """(C,) norms of softmax minus one-hot, where the selector wants them"""
        if by_gradient:
            self.norms = (squares / self.sum.square() - 2.0 * self.own + 1.0).clamp_min_(0.0).sqrt_()[:, 0]

    def keep(self, index: Tensor) -> None:
        """Go on with these rows only."""
        for name in ("valid", "target", "sum", "lse", "losses", "own", "own_slope", "row_weights"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(self, name, value[index])
        self.exp = _keep_in_place(self.exp, index)
        if self.slope is not None:
            self.slope = _keep_in_place(self.slope, index)

    def total(self) -> Tensor:
        """The sum of the losses, each times its row's weight."""
        return self.losses.sum() if self.row_weights is None else self.losses @ self.row_weights[:, 0]

    def gradient(self, factor: Tensor | float) -> tuple[Tensor, Tensor]:
        """The gradient of factor x total: that by logit j is scale x exp[:, j], and `own` at the target.

        Returns scale and own, (C, 1) each; `exp` is zero at the target from here on.
        """
        smoothing = self.options.label_smoothing
        rows = self.valid[:, None] * (factor if self.row_weights is None else factor * self.row_weights)
        softmax = rows * (1.0 + 2.0 * self.options.z_loss * self.lse) if self.options.z_loss else rows
        own = softmax * self.own - (1.0 - smoothing) * rows
        scale = softmax / self.sum
        if smoothing:
            uniform = rows * (smoothing / self.exp.shape[1])
            own = own - uniform
            self.exp.mul_(scale).sub_(uniform)
            if self.slope is not None:
                self.exp.mul_(self.slope)
            scale = torch.ones_like(scale)
        self.exp[torch.arange(len(scale), device=scale.device), self.target[:, 0]] = 0.0
        return scale, own * self.own_slope


def _blocks(logits: Tensor) -> list[tuple[slice, slice]]:
    """(rows, columns) of parts (C, V) that lie together in memory and fit the cache; one part on a GPU."""
    every = slice(None)
    if logits.device.type != "cpu":
        return [(every, every)]
    by_rows = logits.is_contiguous()
    count, width = logits.shape if by_rows else logits.shape[::-1]
    step = max(1, CPU_BLOCK // width)
    parts = [slice(start, start + step) for start in range(0, count, step)]
    return [(part, every) if by_rows else (every, part) for part in parts]
