"""Tensors that have a shape, a dtype and a device, and no memory: what a step does to memory, without the memory.

torch's own `FakeTensorMode` does more (symbolic shapes, checks) and takes ten times as long for each operation.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch._meta_registrations  # the shapes of operations that have no other listing
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

aten = torch.ops.aten
READ = aten._local_scalar_dense.default
CHOICE = aten._fused_sdp_choice.default
FLASH = 1
"""torch's number of the attention that needs no square of scores"""
FURTHEST = 2**31
"""what a whole number that is read from such a tensor is taken for; code that reads positions clamps them"""
META = torch.device("meta")


class Shape(Tensor):
    """A tensor without memory. `inner` is on the meta device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Shape:
        self = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=device,
        )
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(f"{func} met a tensor without memory outside of a rehearsal.")

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Shape({tuple(self.shape)}, {self.dtype}, {self.device})"


def run_on_shapes(func: Any, args: Any, kwargs: dict[str, Any], device: torch.device) -> Any:
    """An operation's results as `Shape`s on a device, where an argument is one or the operation makes tensors."""
    if func is READ:
        dtype = args[0].dtype
        return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else FURTHEST
    if func is CHOICE:
        return FLASH
    inner_args = [_inner(arg) for arg in args]
    inner_kwargs = {name: _inner(arg) for name, arg in kwargs.items()}
    if inner_kwargs.get("device") is not None or (_makes_tensors(func) and not _has_tensor(inner_args)):
        inner_kwargs["device"] = META
    if inner_kwargs.get("pin_memory"):
        inner_kwargs["pin_memory"] = None
    if inner_kwargs.get("generator") is not None:
        inner_kwargs["generator"] = None
    out = func(*inner_args, **inner_kwargs)
    if torch.Tag.inplace_view in func.tags:  # the outer tensor has a shape of its own
        with no_dispatch():
            return func(*args, **kwargs)
    known = {id(arg.inner): arg for arg in (*args, *kwargs.values()) if isinstance(arg, Shape)}
    return _wrapped(out, known, device)


def _inner(arg: Any) -> Any:
    if isinstance(arg, Shape):
        return arg.inner
    if isinstance(arg, (list, tuple)):
        return type(arg)([_inner(one) for one in arg])
    if isinstance(arg, Tensor) and arg.device != META:
        return arg.to(META) if arg.ndim else arg
    return arg


@functools.cache
def _makes_tensors(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _has_tensor(args: Any) -> bool:
    return any(isinstance(a, Tensor) or (isinstance(a, (list, tuple)) and _has_tensor(a)) for a in args)


def _wrapped(out: Any, known: dict[int, Shape], device: torch.device) -> Any:
    if isinstance(out, Tensor):
        same = known.get(id(out))  # an operation in place
        return Shape(out, device) if same is None else same
    if isinstance(out, (list, tuple)):
        return type(out)([_wrapped(one, known, device) for one in out])
    return out
