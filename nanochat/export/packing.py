"""Matrices as GGUF's tensor types store them.

A ternary matrix arrives as float32 values in {-s, 0, s}, with s a float16 number that is the same over every block.
Packing such values loses nothing, and `pack` checks that it did not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nanochat.errors import UserError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

TERNARY_TYPES = ("tq2_0", "tq1_0", "q4_0")
FLOAT_TYPES = ("f16", "f32")
TYPES = TERNARY_TYPES + FLOAT_TYPES
EMBEDDING_TYPES = ("q8_0", "f16", "f32")
BLOCK = {"tq2_0": 256, "tq1_0": 256, "q4_0": 32, "q8_0": 32, "f16": 1, "f32": 1}
"""elements of a row that share one scale"""


def gguf_library():
    """The `gguf` package; raises `UserError` when it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF files need the `gguf` package: pip install 'nanochat[export]'.") from error
    return gguf


def ggml_type(name: str) -> GGMLQuantizationType:
    """`tq2_0` -> GGMLQuantizationType.TQ2_0."""
    return gguf_library().GGMLQuantizationType[name.upper()]


def packed_shape(shape: tuple[int, ...], name: str) -> tuple[tuple[int, ...], type, int]:
    """Shape and numpy type of the array that `pack` returns, and its size in bytes."""
    if name in FLOAT_TYPES:
        kind = np.float16 if name == "f16" else np.float32
        return shape, kind, int(np.prod(shape)) * np.dtype(kind).itemsize
    block, size = gguf_library().GGML_QUANT_SIZES[ggml_type(name)]
    packed = (*shape[:-1], shape[-1] // block * size)
    return packed, np.uint8, int(np.prod(packed))


def pack_q4_0(values: np.ndarray) -> np.ndarray:
    """(rows, cols) in {-s, 0, s} per block of 32 -> (rows, cols / 32 * 18) bytes.

    A block is the float16 scale d and 16 bytes; byte i holds elements i (low nibble) and i + 16, each as 8 +
    v / d.
    """
    rows = values.shape[0]
    blocks = values.reshape(rows, -1, 32)
    scale = np.abs(blocks).max(-1, keepdims=True)
    nibbles = (np.sign(blocks) + 8).astype(np.uint8)
    packed = nibbles[..., :16] | (nibbles[..., 16:] << 4)
    return np.concatenate((scale.astype("<f2").view(np.uint8), packed), -1).reshape(rows, -1)


def pack(values: np.ndarray, name: str, exact: bool) -> np.ndarray:
    """A matrix in the form that a GGUF file holds.

    Args:
        values: (rows, cols) float32.
        name: one of `TYPES` or "q8_0".
        exact: the type must give every value back bit for bit (ternary matrices); otherwise it may round.

    Raises:
        UserError: cols is no multiple of the type's block, or the type cannot hold the values exactly.
    """
    if values.shape[-1] % BLOCK[name]:
        raise UserError(f"{name} needs rows that are multiples of {BLOCK[name]}, not {values.shape[-1]}.")
    if not np.isfinite(values).all():
        raise UserError("the weights are not finite: this checkpoint is of a run that diverged.")
    if name == "f32":
        return np.ascontiguousarray(values, dtype=np.float32)
    if name == "f16":
        with np.errstate(over="ignore"):
            packed = values.astype(np.float16)
        back = packed.astype(np.float32)
    else:
        quants = gguf_library().quants
        packed = pack_q4_0(values) if name == "q4_0" else quants.quantize(values, ggml_type(name))
        back = quants.dequantize(packed, ggml_type(name)) if exact else values
    if exact and not np.array_equal(back, values):
        raise UserError(f"{name} cannot hold these weights exactly.")
    if not np.isfinite(back).all():
        raise UserError(f"{name} cannot hold these weights: they are too large.")
    return packed
