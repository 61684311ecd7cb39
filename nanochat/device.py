"""Where to compute and in which arithmetic: the one place that decides what `auto` is.

A CPU is asked twice: its capability flags say whether it has bf16 or int8 units at all, and a probe of some tens of
milliseconds whether torch's products are clearly faster with them. Both answers are taken once per process.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nanochat.compat import int8_product

BF16_UNITS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
INT8_UNITS = ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "sve_i8mm")
"""names in `torch.cpu.get_capabilities()`, x86's first"""
CLEARLY = 1.3
"""how many times as fast a product has to be"""
PROBE_SIDE = 512
PROBE_SECONDS = 0.02
L2_BYTES = 2**20
"""second-level cache of a core where torch does not say"""


def find_device(name: str = "auto") -> torch.device:
    """The device that a name stands for.

    name: `auto` takes cuda, mps or cpu, the first that this machine has; Lightning's `gpu` leaves out the cpu where it
    can; anything else is torch's own name. Raises `RuntimeError` for a name that torch does not know.
    """
    if name in ("auto", "gpu"):
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(name)


def available_memory() -> int | None:
    """Bytes of the machine's memory that programs could still take; None where the system does not say (Linux does)."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass in `32-true` or `bf16-mixed`, as the Trainer would make it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision != "32-true")


def default_precision(device: torch.device) -> str:
    """Lightning's name of the precision in which a run computes there, unless it says otherwise."""
    return "bf16-mixed" if matmul_dtype(device) == torch.bfloat16 else "32-true"


def matmul_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where products in it are clearly faster than in float32, else float32."""
    return torch.bfloat16 if _bf16_pays(device.type) else torch.float32


def has_int8_products(device: torch.device) -> bool:
    """Whether int8 products are clearly faster there than those in `matmul_dtype`."""
    return _int8_pays(device.type)


@functools.cache
def _bf16_pays(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)  # older ones emulate it
    if device == "cpu":
        return has_units(BF16_UNITS) and CLEARLY * product_seconds(torch.bfloat16) < product_seconds(torch.float32)
    try:
        product_seconds(torch.bfloat16, device)
    except (RuntimeError, TypeError):
        return False
    return True


@functools.cache
def _int8_pays(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    best = matmul_dtype(torch.device(device))
    return device == "cpu" and has_units(INT8_UNITS) and CLEARLY * product_seconds(torch.int8) < product_seconds(best)


def has_units(names: tuple[str, ...]) -> bool:
    """Whether this CPU has any of the capabilities; True, too, where torch does not say: then the probe decides."""
    known = capabilities()
    return not known or any(known.get(name) for name in names)


def capabilities() -> dict[str, object]:
    """What torch knows of this CPU: flags, cache sizes in bytes, its name; `{}` where it does not say."""
    get = getattr(torch.cpu, "get_capabilities", None)
    return dict(get()) if get is not None else {}


def l2_cache_bytes() -> int:
    """Bytes of a core's second-level cache."""
    size = capabilities().get("l2_cache_size")
    return size if isinstance(size, int) and size > 0 else L2_BYTES


def product_seconds(dtype: torch.dtype, device: str = "cpu") -> float:
    """Seconds of a square matrix product of side `PROBE_SIDE`: the fastest of some, after one that warms up."""
    a = torch.ones(PROBE_SIDE, PROBE_SIDE, dtype=dtype, device=device)
    multiply: Callable[[Tensor, Tensor], Tensor] = int8_product if dtype == torch.int8 else torch.mm
    times: list[float] = []
    while len(times) < 2 or sum(times[1:]) < PROBE_SECONDS:
        start = time.perf_counter()
        multiply(a, a)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def product_speeds(device: torch.device) -> dict[str, float]:
    """Gop/s of products in float32, bfloat16 and int8, as probed now; for `nanochat doctor`. CPUs only."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
    return {name: 2e-9 * PROBE_SIDE**3 / product_seconds(dtype, device.type) for name, dtype in dtypes.items()}
