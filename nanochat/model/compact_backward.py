"""A backward pass that runs on a part of the tokens, for code that is written as ordinary torch.

`compact(function, kept, x, ...)` computes `function(x, ...)` for all tokens and inserts one node into the autograd
graph, whose backward gathers the tokens that `kept` names, runs on them alone as smaller dense products, and puts the
gradient back among zeros. Which tokens these are is decided between forward and backward, from the loss (Collider,
arXiv:2502.00340).

The network has no second listing for this. `function` is called with `Rows` in place of tensors, and every torch
function that sees one is computed at once and noted on a tape; so is a function of ours that is wrapped with
`torch.overrides.wrap_torch_function`. Attention, in which tokens meet, has a backward here. All others must treat the
tokens independently; their backward is torch's own, on the kept rows, with shortcuts for the frequent ones (`RULES`).

Dropped tokens get no gradient, at any point: what flows from a kept token into the keys and values of a dropped one is
thrown away. That is the one approximation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import get_default_nowrap_functions
from torch.utils._python_dispatch import _disable_current_modes

from nanochat.model.attention import attention_backward, causal_attention
from nanochat.model.bitlinear import int8_activation
from nanochat.model.int8 import int8_linear, int8_linear_backward, row_steps


class KeptRows:
    """Positions of the tokens that a backward pass keeps, the same number in every sequence.

    `positions`, (B, K) and sorted, is set after the forward pass; None keeps all tokens.
    """

    def __init__(self, positions: Tensor | None = None) -> None:
        self.positions = positions
        self._index: Tensor | None = None

    def _flat(self, length: int) -> Tensor:
        assert self.positions is not None
        if self._index is None:
            offsets = torch.arange(self.positions.shape[0], device=self.positions.device)[:, None] * length
            self._index = (self.positions + offsets).flatten()  # (B * K,)
        return self._index

    def gather(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (B, K, ...)"""
        if self.positions is None:
            return x
        return x.flatten(0, 1).index_select(0, self._flat(x.shape[1])).unflatten(0, self.positions.shape)

    def scatter(self, x: Tensor, length: int) -> Tensor:
        """(B, K, ...) -> (B, T, ...), zero at the dropped tokens."""
        if self.positions is None:
            return x
        full = x.new_zeros(x.shape[0] * length, *x.shape[2:])
        return full.index_copy_(0, self._flat(length), x.flatten(0, 1)).unflatten(0, (-1, length))


Gradients = Iterable[tuple[int, Tensor | None]]
Node = tuple[Callable[..., Gradients], tuple[int, ...]]


class Rows(Tensor):
    """A (B, T, ...) value of all tokens while a tape is running; every use of it is noted there."""

    tape: Tape
    value: Tensor
    key: int

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        if func in get_default_nowrap_functions() or getattr(func, "__name__", "") == "__get__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        tape = _tape_of(args)
        if tape is None:
            raise TypeError(f"{func} was given a running value by keyword; the compact backward cannot follow it.")
        return tape.record(func, args, kwargs)


def _shell(value: Tensor) -> Tensor:
    """What Rows of a value are made of: the value itself, or, where it has no memory (a FakeTensor, which cannot be of
    another class, too), something of its shape and dtype."""
    if type(value) in (Tensor, nn.Parameter):
        return value
    with _disable_current_modes():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _tape_of(args: Iterable[Any]) -> Tape | None:
    for arg in args:
        if isinstance(arg, Rows):
            return arg.tape
        if isinstance(arg, (tuple, list)) and (tape := _tape_of(arg)):
            return tape
    return None


class Tape:
    """What a forward pass leaves for the backward pass of the kept rows.

    Values and weights that get a gradient have a key. A node is its backward (which yields keys with their gradients)
    and the keys of its results.
    """

    def __init__(self, kept: KeptRows) -> None:
        self.kept = kept
        self.nodes: list[Node] = []
        self.sources: list[tuple[int, Tensor]] = []  # what the node in the autograd graph has as inputs
        self._dtypes: list[tuple[int, torch.dtype]] = []  # of the sources
        self._keys = 0
        self._weights: dict[int, int] = {}  # id of a weight -> key
        self._wanted: set[int] = set()
        self._saved: dict[int, Tensor] = {}
        self._uses: dict[int, int] = {}
        self._gathered: dict[int, Tensor] = {}
        # the backward runs outside the block in which autocast was switched on
        self._device, self._shape = "cpu", torch.Size()
        self._autocast: tuple[bool, torch.dtype] = (False, torch.bfloat16)

    # ---- forward ------------------------------------------------------------------------------------------------

    def _rows(self, value: Tensor, wanted: bool) -> Rows:
        rows = Tensor._make_subclass(Rows, _shell(value))
        self._keys += 1
        rows.tape, rows.value, rows.key = self, value, self._keys
        if wanted:
            self._wanted.add(rows.key)
        return rows

    def input(self, x: Tensor) -> Rows:
        """A tensor of all tokens (B, T, ...) that the function reads."""
        self._device, self._shape = x.device.type, x.shape[:2]
        self._autocast = (torch.is_autocast_enabled(self._device), torch.get_autocast_dtype(self._device))
        rows = self._rows(x.detach(), x.requires_grad)
        if x.requires_grad:
            self.sources.append((rows.key, x))
        return rows

    def weight(self, tensor: Tensor) -> int | None:
        """The key of a tensor that is no row value, or None when it needs no gradient."""
        if not tensor.requires_grad:
            return None
        key = self._weights.get(id(tensor))
        if key is None:
            self._keys += 1
            key = self._weights[id(tensor)] = self._keys
            self._wanted.add(key)
            self.sources.append((key, tensor))
        return key

    def save(self, rows: Rows) -> int:
        """Keep a value for the backward; every `save` allows one `fetch`, of the kept rows or of all."""
        self._saved[rows.key] = rows.value
        self._uses[rows.key] = self._uses.get(rows.key, 0) + 1
        return rows.key

    def save_constant(self, tensor: Tensor) -> int:
        """Keep a tensor that is no row value, for one `fetch` of all of it."""
        self._keys += 1
        self._saved[self._keys], self._uses[self._keys] = tensor, 1
        return self._keys

    def leave(self) -> tuple[list[int], list[Tensor]]:
        """The keys and tensors that the backward will read, for autograd to keep; the tape lets go of them."""
        keys, values = list(self._saved), list(self._saved.values())
        self._dtypes = [(key, tensor.dtype) for key, tensor in self.sources]
        self._saved, self.sources = {}, []
        return keys, values

    def resume(self, keys: list[int], values: tuple[Tensor, ...]) -> None:
        """Take back what `leave` gave."""
        self._saved = dict(zip(keys, values, strict=True))

    def wants(self, key: int | None) -> bool:
        """Whether a gradient with this key is needed."""
        return key in self._wanted

    def record(self, func: Callable, args: Any, kwargs: dict[str, Any]) -> Any:
        """Compute a function of rows and note how its gradient is taken."""
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            out = func(*_map(args, _value), **kwargs)
        outs = out if isinstance(out, (tuple, list)) else (out,)
        if not all(isinstance(o, Tensor) for o in outs):
            return out
        keys = [self.weight(a) if type(a) is not Rows else a.key for a in _flatten(args) if isinstance(a, Tensor)]
        keys += [self.weight(a) for a in kwargs.values() if isinstance(a, Tensor)]
        wanted = any(map(self.wants, keys))
        if any(o.shape[:2] != self._shape for o in outs):
            name = getattr(func, "__name__", func)
            raise TypeError(f"{name} mixes the tokens: the compact backward needs (B, T, ...) at every step.")
        results = [self._rows(o, wanted) for o in outs]
        if wanted:
            backward = RULES.get(func, _by_autograd)(self, func, args, kwargs, outs)
            self.nodes.append((backward, tuple(r.key for r in results)))
        return type(out)(results) if isinstance(out, (tuple, list)) else results[0]

    # ---- backward -----------------------------------------------------------------------------------------------

    def fetch(self, key: int, all_rows: bool = False) -> Tensor:
        """A saved value: its kept rows (gathered once, however many read them), or all of them."""
        value = self._saved[key]
        self._uses[key] -= 1
        last = not self._uses[key]
        if not all_rows:
            value = self._gathered.get(key)
            if value is None:
                value = self._gathered[key] = self.kept.gather(self._saved[key])
        if last:
            del self._saved[key]
            self._gathered.pop(key, None)
        return value

    def backward(self, result: int, gradient: Tensor) -> list[Tensor | None]:
        """The gradients of `sources`, from the gradient (B, T, ...) of the function's result."""
        length = gradient.shape[1]
        gradients: dict[int, Tensor | None] = {result: self.kept.gather(gradient)}
        enabled, dtype = self._autocast
        with torch.no_grad(), torch.autocast(self._device, dtype, enabled=enabled):
            while self.nodes:
                backward, keys = self.nodes.pop()  # what it holds is freed as soon as it has been used
                arrived = [gradients.pop(key, None) for key in keys]
                if all(g is None for g in arrived):
                    continue
                for key, g in backward(self, *arrived):
                    if g is None or not self.wants(key):
                        continue
                    before = gradients.get(key)
                    gradients[key] = g if before is None else before + g
        out = []
        for key, dtype in self._dtypes:
            g = gradients.get(key)
            if g is not None and key not in self._weights.values():
                g = self.kept.scatter(g, length)
            out.append(None if g is None else g.to(dtype))
        return out


def _flatten(args: Any) -> Iterable[Any]:
    for arg in args:
        if isinstance(arg, (tuple, list)):
            yield from _flatten(arg)
        else:
            yield arg


def _map(args: Any, function: Callable[[Any], Any]) -> Any:
    return type(args)([_map(a, function) if isinstance(a, (tuple, list)) else function(a) for a in args])


def _value(arg: Any) -> Any:
    return arg.value if isinstance(arg, Rows) else arg


class _Key(int):
    """Marks the place of a saved value among a function's arguments."""


def _by_autograd(tape: Tape, func: Callable, args: Any, kwargs: dict[str, Any], outs: Any) -> Callable[..., Gradients]:
    """Torch's own backward: the function is computed once more, on the kept rows."""
    places = _map(args, lambda a: _Key(tape.save(a)) if isinstance(a, Rows) else a)

    def backward(tape: Tape, *gradients: Tensor | None) -> Gradients:
        leaves: list[tuple[int, Tensor]] = []

        def leaf(arg: Any) -> Any:
            key = arg if isinstance(arg, _Key) else tape.weight(arg) if isinstance(arg, Tensor) else None
            if key is None:
                return arg
            tensor = (tape.fetch(key) if isinstance(arg, _Key) else arg).detach()
            if tape.wants(key):
                leaves.append((key, tensor.requires_grad_()))
            return tensor

        with torch.enable_grad():
            out = func(*_map(places, leaf), **{name: leaf(value) for name, value in kwargs.items()})
        pairs = [(o, g) for o, g in zip(out if isinstance(out, (tuple, list)) else (out,), gradients, strict=True)]
        pairs = [(o, g) for o, g in pairs if g is not None]
        found = torch.autograd.grad(
            [o for o, _ in pairs], [t for _, t in leaves], [g.to(o.dtype) for o, g in pairs], allow_unused=True
        )
        return zip([key for key, _ in leaves], found, strict=True)

    return backward


def _linear(tape: Tape, func: Callable, args: Any, kwargs: dict[str, Any], outs: Any) -> Callable[..., Gradients]:
    """y = x w^T: two products of the kept rows."""
    x, w = args[:2]
    if len(args) > 2 or kwargs or not isinstance(x, Rows) or isinstance(w, Rows):
        return _by_autograd(tape, func, args, kwargs, outs)
    x_key, w_key = x.key, tape.weight(w)
    if w_key is not None:
        tape.save(x)
    w_saved = tape.save_constant(w) if tape.wants(x_key) else None

    def backward(tape: Tape, g: Tensor) -> Gradients:
        if w_saved is not None:
            yield x_key, torch.matmul(g, tape.fetch(w_saved, all_rows=True))
        if w_key is not None:
            yield w_key, torch.mm(g.flatten(0, -2).t(), tape.fetch(x_key).flatten(0, -2))

    return backward


def _add(tape: Tape, func: Callable, args: Any, kwargs: dict[str, Any], outs: Any) -> Callable[..., Gradients]:
    """x + y of equal shapes: needs neither of them."""
    a, b = args
    if kwargs or not (isinstance(a, Rows) and isinstance(b, Rows)) or a.value.shape != b.value.shape:
        return _by_autograd(tape, func, args, kwargs, outs)
    keys = a.key, b.key
    return lambda tape, g: [(key, g) for key in keys]


def _reshape(tape: Tape, func: Callable, args: Any, kwargs: dict[str, Any], outs: Any) -> Callable[..., Gradients]:
    """Another shape of what each token has: needs no values."""
    x = args[0]
    key, shape = x.key, x.value.shape[2:]
    return lambda tape, g: [(key, g.reshape(*g.shape[:2], *shape))]


def _straight_through(
    tape: Tape, func: Callable, args: Any, kwargs: dict[str, Any], outs: Any
) -> Callable[..., Gradients]:
    """Rounding: the gradient of the result is that of the argument."""
    key = args[0].key
    return lambda tape, g: [(key, g)]


def _int8_linear(tape: Tape, func: Callable, args: Any, kwargs: dict[str, Any], outs: Any) -> Callable[..., Gradients]:
    """Several integer products of the same rows, whose codes are made again."""
    x, weights, trits, scales, int8_backward = args
    x_key, w_keys = tape.save(x), [tape.weight(w) for w in weights]
    integers = [tape.save_constant(t) for t in (*trits, *scales)]

    def backward(tape: Tape, *arrived: Tensor | None) -> Gradients:
        rows = tape.fetch(x_key)  # (B, K, d)
        constants = [tape.fetch(key, all_rows=True) for key in integers]
        trits, scales = constants[: len(w_keys)], constants[len(w_keys) :]
        wide, step = row_steps(rows.flatten(0, 1))
        codes = (wide / step).round_().to(torch.int8)
        known = [(g, t, s, key) for g, t, s, key in zip(arrived, trits, scales, w_keys, strict=True) if g is not None]
        gradients, own_trits, own_scales, keys = map(list, zip(*known, strict=True))
        dx, dw = int8_linear_backward(gradients, codes, step, own_trits, own_scales, int8_backward)
        yield x_key, dx
        yield from ((key, g) for key, g in zip(keys, dw, strict=True) if key is not None)

    return backward


def _attention(tape: Tape, func: Callable, args: Any, kwargs: dict[str, Any], outs: Any) -> Callable[..., Gradients]:
    """Kept queries against all keys."""
    keys = [tape.save(arg) for arg in args]

    def backward(tape: Tape, g: Tensor) -> Gradients:
        q, k, v = (tape.fetch(key, all_rows=i > 0) for i, key in enumerate(keys))
        dq, dk, dv = attention_backward(g, q, k, v, tape.kept.positions)
        rows = dq, tape.kept.gather(dk), tape.kept.gather(dv)
        return zip(keys, (d.to(t.dtype) for d, t in zip(rows, (q, k, v), strict=True)), strict=True)

    return backward


RULES: dict[Callable, Callable] = {
    causal_attention: _attention,
    int8_activation: _straight_through,
    int8_linear: _int8_linear,
    F.linear: _linear,
    torch.Tensor.add: _add,
    torch.Tensor.__add__: _add,
    torch.add: _add,
    torch.Tensor.flatten: _reshape,
    torch.Tensor.unflatten: _reshape,
    torch.Tensor.reshape: _reshape,
    torch.Tensor.view: _reshape,
}


class _Splice(torch.autograd.Function):
    clear_saved_tensors_on_access = True  # the tape frees each of them as soon as it has been used

    @staticmethod
    def forward(ctx, tape: Tape, result: int, value: Tensor, *sources: Tensor) -> Tensor:
        ctx.tape, ctx.result = tape, result
        # where others find them: activation checkpointing, which drops and recomputes them, and who counts memory
        ctx.keys, values = tape.leave()
        ctx.save_for_backward(*values)
        return value.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        if ctx.tape is None:
            raise RuntimeError("the compact backward frees what it reads: call backward a single time.")
        tape, ctx.tape = ctx.tape, None
        tape.resume(ctx.keys, ctx.saved_tensors)
        return None, None, None, *tape.backward(ctx.result, gradient)


def compact(function: Callable[..., Tensor], kept: KeptRows, *inputs: Tensor) -> Tensor:
    """`function(*inputs)` for all tokens, with a backward that runs on the rows of `kept` alone.

    Args:
        function: ordinary torch code; gives one tensor (B, T, ...).
        kept: set between this call and the backward.
        inputs: (B, T, ...) each.
    """
    tape = Tape(kept)
    out = function(*map(tape.input, inputs))
    return _Splice.apply(tape, out.key, out.value, *[tensor for _, tensor in tape.sources])  # type: ignore[return-value]
