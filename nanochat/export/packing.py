"""Matrices as GGUF's tensor types store them.

A ternary matrix arrives as float32 values in {-s, 0, s}, with s a float16 number that is the same over every block.
Packing such values loses nothing, and `pack` checks that it did not.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np

from nanochat.errors import UserError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

TERNARY_TYPES = ("tq2_0", "tq1_0", "q2_0", "q4_0")
FLOAT_TYPES = ("f16", "f32")
TYPES = TERNARY_TYPES + FLOAT_TYPES
EMBEDDING_TYPES = ("q8_0", "f16", "f32")
BLOCK = {"tq2_0": 256, "tq1_0": 256, "q2_0": 64, "q4_0": 32, "q8_0": 32, "f16": 1, "f32": 1}
"""elements of a row that share one scale"""
NUMBERS = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "tq1_0": 34, "tq2_0": 35, "q2_0": 42}
"""ggml_type; the `gguf` package does not know q2_0 yet"""
BLOCK_BYTES = {"f32": 4, "f16": 2, "q4_0": 18, "q8_0": 34, "tq1_0": 54, "tq2_0": 66, "q2_0": 18}


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


def packed_bytes(shape: tuple[int, ...], name: str) -> int:
    """The size of what `pack` returns."""
    return prod(shape) // BLOCK[name] * BLOCK_BYTES[name]


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


def pack_q2_0(values: np.ndarray) -> np.ndarray:
    """(rows, cols) in {-s, 0, s} per block of 64 -> (rows, cols / 64 * 18) bytes.

    A block is the float16 scale d and 16 bytes; byte i holds elements 4 i to 4 i + 3, two bits each from the lowest
    on, as 1 + v / d.
    """
    rows = values.shape[0]
    blocks = values.reshape(rows, -1, 64)
    scale = np.abs(blocks).max(-1, keepdims=True)
    codes = (np.sign(blocks) + 1).astype(np.uint8).reshape(rows, -1, 16, 4)
    packed = codes[..., 0] | codes[..., 1] << 2 | codes[..., 2] << 4 | codes[..., 3] << 6
    return np.concatenate((scale.astype("<f2").view(np.uint8), packed), -1).reshape(rows, -1)


def unpack_q2_0(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack_q2_0`: (..., bytes) -> (..., cols) float32; any 2-bit code gives code - 1."""
    blocks = packed.reshape(*packed.shape[:-1], -1, 18)
    scale = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
    codes = (blocks[..., 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    values = (codes.reshape(*blocks.shape[:-1], 64).astype(np.float32) - 1) * scale
    return values.reshape(*packed.shape[:-1], -1)


def unpack(packed: np.ndarray, name: str) -> np.ndarray:
    """(..., bytes) of a quantised type -> (..., cols) float32."""
    return unpack_q2_0(packed) if name == "q2_0" else gguf_library().quants.dequantize(packed, ggml_type(name))


_OWN = {"q4_0": pack_q4_0, "q2_0": pack_q2_0}


def pack(values: np.ndarray, name: str, exact: bool) -> np.ndarray:
    """A matrix in the form that a GGUF file holds.

    Args:
        values: (rows, cols) float32.
        name: one of `TYPES` or "q8_0".
        exact: the type must give every value back bit for bit (ternary matrices); otherwise it may round.

    Raises:
        UserError: cols is not a multiple of the type's block, or the type cannot hold the values exactly.
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
        own = _OWN.get(name)
        packed = own(values) if own else gguf_library().quants.quantize(values, ggml_type(name))
        back = unpack(packed, name) if exact else values
    if exact and not np.array_equal(back, values):
        raise UserError(f"{name} cannot hold these weights exactly.")
    if not np.isfinite(back).all():
        raise UserError(f"{name} cannot hold these weights: they are too large.")
    return packed
