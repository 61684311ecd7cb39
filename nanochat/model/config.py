"""The network's configuration: the one typed boundary between Hydra's dictionaries and the model.

It is saved as JSON beside every checkpoint, so that export and inference need neither Hydra nor Lightning.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.errors import ConfigError, UserError
from nanochat.files import atomic_write

ACTIVATIONS = ("silu", "relu2")
ACTIVATION_SCALES = ("token", "block", "none")
STREAM_MAPS = ("static", "dynamic")
VALUE_GATES = ("static", "input")
VALUE_GATE_CHANNELS = 12  # of the stream, which a gate of the input reads
SCALE_FORMATS = ("bfloat16", "float16")
BEFORE = {"scale_format": "float16"}
"""values of fields that files from before them lack, where they differ from the defaults"""


def constant_scales(block: int | str, inputs: int) -> bool:
    """Whether a ternary matrix with this many inputs has one scale along each row."""
    return block in ("row", 0) or (isinstance(block, int) and block >= inputs)


def int8_fits(values: Mapping[str, Any]) -> bool:
    """Whether a network of these fields of a GPTConfig can compute its forward pass in integers."""
    widths = [values.get("dim"), values.get("ffn_dim")]
    return (
        values.get("ternary") is True
        and values.get("activation_scale") == "token"
        and all(isinstance(w, int) and constant_scales(values.get("weight_block", 256), w) for w in widths)
    )


@dataclass(frozen=True)
class GPTConfig:
    """Shape and switches of a GPT. The defaults are the Qwen3 block, which stock llama.cpp runs.

    Raises `ConfigError` with every rule that the values break.
    """

    vocab_size: int = 4096
    dim: int = 256
    """width of the residual stream"""
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 4
    """query head h reads key/value head h // (n_heads // n_kv_heads)"""
    ffn_dim: int = 512
    seq_len: int = 256
    """longest sequence, in tokens"""
    tied: bool = True
    """the output matrix is the embedding table"""
    rope_base: float = 100_000.0
    norm_eps: float = 1e-6

    qk_norm: bool = True
    """RMSNorm of each query and key head before RoPE (off: exports as `llama`)"""
    embedding_norm: bool = True
    """gainless RMSNorm after the embedding; folded into the table at export"""
    sub_norm: bool = False
    """RMSNorm before the attention output and the FFN down projection (exports as `bitnet`)"""
    activation: str = "silu"
    """of the gated feed-forward: silu, or relu2 (which stock llama.cpp cannot run)"""
    softcap: float = 0.0
    """logits = softcap * tanh(logits / softcap); 0 is off (stock llama.cpp cannot run it with this block)"""

    ternary: bool = True
    """{-1, 0, 1} weights in the blocks' matrices; false is the float arm of a comparison"""
    weight_block: int | str = 256
    """weights that share one scale, along the input dimension; `row`: one scale per row, 0: one per matrix"""
    scale_format: str = "bfloat16"
    """bfloat16: scales exact in float16 and bfloat16; float16: as before this switch, exact in float16 alone"""
    activation_scale: str = "token"
    """int8 activations by the absolute maximum per token, per block of 256 (as ggml's Q8_K), or none"""
    int8: bool | str = False
    """integer forward pass; `auto` is for a run to settle from its machine, and false here"""
    int8_backward: bool = False
    """with it, the gradients of the activations in integers, too, from gradients that are rounded stochastically"""

    value_embeddings: int = 0
    """tables of value embeddings: 0, 1 or 2 (2 take turns over the layers)"""
    value_embedding_layers: tuple[int, ...] | None = None
    """the layers that read them, counted from 0; None: all"""
    value_embedding_width: int | None = None
    """numbers a token in each table, whole key/value heads; None: all of them"""
    value_gate: str = "static"
    """static: a learned factor for each head, which exports; input: a sigmoid of the stream, which does not"""

    streams: int = 1
    """residual streams (hyper-connections): 2 or 4; 1 is the plain residual"""
    stream_maps: str = "static"
    """how sub-layers read, write and mix the streams: static (learned constants) or dynamic (of the input too)"""

    embedding_std: float | None = None
    """None: 0.8 in front of an embedding norm, 0.02 without, 5.12 / dim when tied"""
    value_embedding_std: float = 0.0625
    value_gain: float = 1.5
    """initial factor of the value embeddings in a layer (static gate)"""
    head_std: float = 0.001
    """of an untied output matrix"""
    qk_gain: float = 1.2
    """initial gain of the query and key norms"""
    zero_init: bool = True
    """attention output and FFN down projection start at zero"""

    def __post_init__(self) -> None:
        if isinstance(self.value_embedding_layers, list):  # as JSON and YAML give it
            object.__setattr__(self, "value_embedding_layers", tuple(self.value_embedding_layers))
        problems = list(self._problems())
        if problems:
            raise ConfigError(problems)

    def _problems(self):
        for field in (
            "vocab_size",
            "dim",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "ffn_dim",
            "seq_len",
            "streams",
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                yield f"model.{field}={value!r} must be a whole number of at least 1."
                return
        if self.dim % self.n_heads:
            yield f"model.dim={self.dim} is not divisible by model.n_heads={self.n_heads}."
        elif self.head_dim % 2:
            yield f"model.dim / model.n_heads = {self.head_dim} must be even, since RoPE turns pairs."
        if self.n_heads % self.n_kv_heads:
            yield f"model.n_heads={self.n_heads} is not divisible by model.n_kv_heads={self.n_kv_heads}."
        if self.activation not in ACTIVATIONS:
            yield f"model.activation={self.activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}."
        if self.activation_scale not in ACTIVATION_SCALES:
            yield (
                f"model.activation_scale={self.activation_scale!r} is unknown; "
                f"choose one of {', '.join(ACTIVATION_SCALES)}."
            )
        if self.streams not in (1, 2, 4):
            yield f"model.streams={self.streams} (mhc.streams sets it) must be 2 or 4 (1 is off)."
        if self.stream_maps not in STREAM_MAPS:
            choices = ", ".join(STREAM_MAPS)
            yield f"model.stream_maps={self.stream_maps!r} (mhc.maps sets it) is unknown; choose one of {choices}."
        block = self.weight_block
        if block != "row" and (not isinstance(block, int) or isinstance(block, bool) or block < 0):
            yield f"model.weight_block={block!r} must be positive, `row`, or 0 (one scale per matrix)."
            return
        if self.scale_format not in SCALE_FORMATS:
            yield f"model.scale_format={self.scale_format!r} is unknown; choose one of {', '.join(SCALE_FORMATS)}."
        if self.int8 not in (True, False, "auto") or (self.int8 in (0, 1) and not isinstance(self.int8, bool)):
            yield f"model.int8={self.int8!r} must be auto, true or false."
        elif self.int8 is True and not self.ternary:
            yield "model.int8=true needs ternary weights, and model.ternary is false."
        elif self.int8 is True and self.activation_scale != "token":
            yield f"model.int8=true needs model.activation_scale=token, not {self.activation_scale}."
        elif self.int8 is True and not int8_fits(vars(self)):
            yield (
                f"model.int8=true needs scales that are constant along a row, and model.weight_block={block} is less "
                f"than {max(self.dim, self.ffn_dim)} inputs; use model.weight_block=row."
            )
        if not isinstance(self.int8_backward, bool):
            yield f"model.int8_backward={self.int8_backward!r} must be true or false."
        elif self.int8_backward and (not self.int8 or (self.int8 == "auto" and not int8_fits(vars(self)))):
            yield "model.int8_backward=true needs the integer forward pass, which is off here; set model.int8=true."
        yield from self._value_problems()
        for field in ("rope_base", "norm_eps"):
            if not getattr(self, field) > 0:
                yield f"model.{field}={getattr(self, field)!r} must be positive."
        for field in ("softcap", "head_std", "qk_gain", "value_embedding_std"):
            if not getattr(self, field) >= 0:
                yield f"model.{field}={getattr(self, field)!r} must not be negative."
        if self.embedding_std is not None and not self.embedding_std > 0:
            yield f"model.embedding_std={self.embedding_std!r} must be positive (or null)."

    def _value_problems(self):
        if self.value_embeddings not in (0, 1, 2):
            yield f"model.value_embeddings={self.value_embeddings!r} must be 0, 1 or 2 tables."
            return
        if self.value_gate not in VALUE_GATES:
            yield f"model.value_gate={self.value_gate!r} is unknown; choose one of {', '.join(VALUE_GATES)}."
        if not self.value_embeddings:
            return
        layers, width = self.value_embedding_layers, self.value_embedding_width
        if layers is not None:
            if not isinstance(layers, tuple) or not all(type(i) is int and 0 <= i < self.n_layers for i in layers):
                yield (
                    f"model.value_embedding_layers={list(layers) if isinstance(layers, tuple) else layers!r} must be "
                    f"layers from 0 to {self.n_layers - 1}, or null for all."
                )
                return
            if list(layers) != sorted(set(layers)) or not layers:
                yield f"model.value_embedding_layers={list(layers)} must name each layer once, in order."
        if self.value_embeddings > len(self.value_layers):
            yield (
                f"model.value_embeddings={self.value_embeddings} has more tables than model.value_embedding_layers has "
                f"layers ({len(self.value_layers)})."
            )
        if self.dim % self.n_heads or not isinstance(self.n_kv_heads, int):
            return
        whole = self.n_kv_heads * self.head_dim
        if width is not None and (type(width) is not int or not 0 < width <= whole or width % self.head_dim):
            yield (
                f"model.value_embedding_width={width!r} must be a multiple of the head's width {self.head_dim}, "
                f"at most {whole} ({self.n_kv_heads} key/value heads)."
            )
        if self.value_gate == "input" and self.dim < VALUE_GATE_CHANNELS:
            yield f"model.value_gate=input needs a model.dim of at least {VALUE_GATE_CHANNELS}, not {self.dim}."

    @property
    def value_layers(self) -> tuple[int, ...]:
        """the layers that add value embeddings"""
        if not self.value_embeddings:
            return ()
        return tuple(range(self.n_layers)) if self.value_embedding_layers is None else self.value_embedding_layers

    @property
    def value_width(self) -> int:
        """numbers a token in one table of value embeddings; 0 without"""
        if not self.value_embeddings:
            return 0
        return self.n_kv_heads * self.head_dim if self.value_embedding_width is None else self.value_embedding_width

    def value_table(self, layer: int) -> int | None:
        """Which table a layer reads; None for a layer that reads none."""
        return self.value_layers.index(layer) % self.value_embeddings if layer in self.value_layers else None

    @property
    def lane_width(self) -> int:
        """How much wider the residual stream of the exported file is: the tables of a static gate ride along there."""
        return self.value_embeddings * self.value_width if self.value_gate == "static" else 0

    @property
    def stream_width(self) -> int:
        """width of the residual stream and its lane: what the norms take the mean square over"""
        return self.dim + self.lane_width

    @property
    def head_dim(self) -> int:
        """width of one attention head"""
        return self.dim // self.n_heads

    @property
    def initial_embedding_std(self) -> float:
        """Standard deviation of the embedding table at the start.

        A tied table is also the output matrix: a token's own logit starts near dim * std, so that a std which does
        not shrink with the width puts the initial loss far above ln(vocab_size).
        """
        if self.embedding_std is not None:
            return self.embedding_std
        if self.tied:
            return 5.12 / self.dim
        return 0.8 if self.embedding_norm else 0.02

    def to_json(self, path: str | Path) -> None:
        """Write the configuration as JSON, in place of a file that is there."""
        with atomic_write(Path(path)) as file:
            file.write((json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())

    @classmethod
    def from_dict(cls, values: dict) -> GPTConfig:
        """Build from a mapping, which may be older than some fields.

        Raises `UserError` when it has unknown keys (a file of a newer version).
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"the model's configuration has unknown keys: {', '.join(unknown)}.")
        return cls(**{**BEFORE, **values})

    @classmethod
    def from_json(cls, path: str | Path) -> GPTConfig:
        """Read what `to_json` wrote; raises `UserError` when the file is missing or is not such a JSON."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not a readable model configuration: {error}.") from error
        if not isinstance(values, dict):
            raise UserError(f"{path} is not a model configuration.")
        return cls.from_dict(values)
