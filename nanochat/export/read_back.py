"""Exported files as networks and as runs again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nanochat.checkpoint import CHECKPOINT_FORMAT, GPT_PREFIX, OBJECTIVES_PREFIX, build_gpt
from nanochat.errors import UserError
from nanochat.export.gguf import FILE_TYPES
from nanochat.export.gguf_reader import GGUFFile
from nanochat.export.gguf_tensors import read_network
from nanochat.export.huggingface import read_config, read_huggingface
from nanochat.files import replacing
from nanochat.model.bitlinear import BitLinear, dequantise, ternarise
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.zoo.store import located


@dataclass(frozen=True)
class Exported:
    """A network read from a file."""

    path: Path
    architecture: str
    type: str
    config: GPTConfig
    """of the network in the file; an embedding norm that was folded is off here"""
    weights: dict[str, Tensor]
    """by the names of `GPT.state_dict()`, float32, matrices de-quantised"""
    tokenizer: str | None
    """`tokenizer.json`"""
    objectives: dict[str, Tensor] = field(default_factory=dict)
    """parameters of the heads of multi-token prediction, by the names of `Run.objectives`"""
    step: int = 0


def read_export(path: str | Path) -> Exported:
    """Read a GGUF file or a safetensors folder that nanochat wrote, or `zoo:NAME`.

    Raises `UserError` for a file that is missing, damaged, or of another program.
    """
    path = located(path)
    if path.suffix == ".safetensors":
        path = path.parent
    if path.is_dir():
        config, weights, kind = read_huggingface(path)
        tokenizer = path / "tokenizer.json"
        text = tokenizer.read_text(encoding="utf-8") if tokenizer.is_file() else None
        return Exported(path, kind, "safetensors", config, weights, text)
    with GGUFFile(path) as file:
        arch = file.get("general.architecture", str)
        if "nanochat.config" not in file.metadata:
            raise UserError(f"{path} was not written by nanochat: it lacks the key nanochat.config.")
        try:
            values = json.loads(file.get("nanochat.config", str))
        except ValueError as error:
            raise UserError(f"{path} has a damaged model configuration: {error}.") from error
        if not isinstance(values, dict):
            raise UserError(f"{path} has a damaged model configuration.")
        kinds = {number: name for name, number in FILE_TYPES.items()}
        kind = kinds.get(file.get("general.file_type", int))
        if kind is None:
            raise UserError(f"{path} has a general.file_type that nanochat does not write.")
        nextn = file.get(f"{arch}.nextn_predict_layers", int, 0)
        config, weights = read_network(file, read_config(values, path), arch, kind, nextn)
        objectives = {name: weights.pop(name) for name in list(weights) if name.startswith("mtp.")}
        tokenizer_json = file.get("tokenizer.huggingface.json", str, "") or None
        step = file.get("nanochat.step", int, 0)
        return Exported(path, arch, kind, config, weights, tokenizer_json, objectives, step)


def network(exported: Exported) -> GPT:
    """The network of a file, for inference, with the matrices as they are there."""
    gpt = build_gpt(exported.config, exported.weights, source=exported.path)
    for module in gpt.modules():
        if isinstance(module, BitLinear):
            module.ternary = False
    return gpt.requires_grad_(False).eval()


def latent_weight(values: Tensor, block: int | str) -> Tensor:
    """A float matrix that `ternarise` maps to exactly these values.

    The scale of a block is the mean of its magnitudes, which zeros lower: non-zero values are raised by the
    inverse of their share, so that the mean is the scale again.

    values: (out, in) in {-s, 0, s} per block; block: as in `ternarise`.
    """
    rows, cols = values.shape
    width = cols if block == "row" else int(block)
    parts = list(values.split(width, dim=1)) if width else [values.reshape(1, -1)]
    raised = []
    for part in parts:
        share = (part != 0).double().mean(-1, keepdim=True).clamp_min(1e-12)
        raised.append((part.double() / share).float())
    return torch.cat(raised, 1).view(rows, cols)


def _is_ternary(name: str, tensor: Tensor) -> bool:
    """Whether a parameter is a matrix of a block; tables, head, gates and the maps of residual streams are not."""
    return (
        tensor.ndim == 2 and (".blocks." in name or ".mtp." in name) and "hyper_" not in name and ".value." not in name
    )


def _latent(exported: Exported, name: str, values: Tensor) -> Tensor:
    block, scale_format = exported.config.weight_block, exported.config.scale_format
    latent = latent_weight(values, block)
    if not torch.equal(dequantise(*ternarise(latent, block, scale_format), block), values):
        raise UserError(f"{exported.path}: {name} does not hold ternary weights on the grid of this network.")
    return latent


def latent_weights(exported: Exported) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters of the network and of the objectives whose ternary forms are the values of a file, bit for bit.

    Raises `UserError` when a matrix of a ternary network holds something else.
    """

    def latent(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        return {
            name: _latent(exported, name, values) if _is_ternary(prefix + name, values) else values
            for name, values in tensors.items()
        }

    if not exported.config.ternary:
        return exported.weights, exported.objectives
    return latent(exported.weights, GPT_PREFIX), latent(exported.objectives, OBJECTIVES_PREFIX)


def import_export(path: str | Path, out: str | Path, *, force: bool = False) -> Path:
    """Make a run folder with one checkpoint from an exported file; returns the folder.

    The matrices that its network multiplies by are bit-equal to the file's.

    Raises:
        UserError: a file that cannot be read, a folder that exists, or that cannot be written.
    """
    exported, out = read_export(path), Path(out)
    if out.exists():
        if not force:
            raise UserError(f"{out} exists; use --force to replace it, or choose another --out.")
        if not (out / "model.json").is_file() or (out / "metrics.csv").exists() or (out / "config.yaml").exists():
            raise UserError(f"{out} is not an imported model, so --force does not replace it; choose another --out.")
    build_gpt(exported.config, exported.weights, source=exported.path)
    weights, objectives = latent_weights(exported)
    state = {GPT_PREFIX + name: tensor for name, tensor in weights.items()}
    state |= {OBJECTIVES_PREFIX + name: tensor for name, tensor in objectives.items()}
    checkpoint = {
        "state_dict": state,
        "global_step": exported.step,
        "nanochat_format": CHECKPOINT_FORMAT,
    }
    try:
        with replacing(out) as aside:
            (aside / "checkpoints").mkdir(parents=True)
            exported.config.to_json(aside / "model.json")
            if exported.tokenizer is not None:
                (aside / "tokenizer.json").write_text(exported.tokenizer, encoding="utf-8")
            torch.save(checkpoint, aside / "checkpoints" / "last.ckpt")
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        raise UserError(f"{out} cannot be written: {error}.") from error
    return out
