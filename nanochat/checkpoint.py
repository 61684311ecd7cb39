"""Reading a trained model back: run folder -> network, tokenizer, configuration.

A run folder holds `model.json` (GPTConfig), `tokenizer.json` and `checkpoints/{step=N,last}.ckpt`. A
checkpoint is Lightning's dictionary; its `state_dict` has the network under `gpt.` and what the objectives
own (an MTP head) under `objectives.`. Neither Hydra nor Lightning is needed to read it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.model.hyper_connections import HyperConnection
from nanochat.model.rotary import rope_table
from nanochat.run_folder import find_checkpoint

if TYPE_CHECKING:
    from nanochat.data.tokenizer import Tokenizer

CHECKPOINT_FORMAT = 1
"""value of a checkpoint's `nanochat_format` key; a reader refuses greater ones"""

GPT_PREFIX = "gpt."
OBJECTIVES_PREFIX = "objectives."


@dataclass
class Run:
    """A trained model and where it came from."""

    folder: Path
    checkpoint: Path
    gpt: GPT
    config: GPTConfig
    objectives: dict[str, Tensor] = field(default_factory=dict)
    """parameters that objectives own, by name without the `objectives.` prefix"""
    meta: dict[str, Any] = field(default_factory=dict)
    """step: optimizer steps done; hyper_parameters: the run's plain-dict configuration, if it was saved"""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer, read when first asked for; raises `UserError` when the run has none."""
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{self.folder} has no tokenizer.json, so its tokens cannot be turned into text.")
        from nanochat.data.tokenizer import Tokenizer  # the network itself needs no data package

        return Tokenizer.load(path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's dictionary, tensors on the CPU (memory-mapped) and nothing executed while reading.

    Raises `UserError` when the file is truncated, corrupt, of a newer format, or no checkpoint at all.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged bytes can make the unpickler raise anything
        raise UserError(
            f"{path} cannot be read: it is truncated, corrupt, or no nanochat checkpoint ({_first_line(error)})."
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{path} is not a nanochat checkpoint: it has no state_dict.")
    for name, tensor in checkpoint["state_dict"].items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path} is corrupt: its state_dict does not hold named tensors.")
    version = checkpoint.get("nanochat_format", CHECKPOINT_FORMAT)
    if not isinstance(version, int) or version > CHECKPOINT_FORMAT:
        raise UserError(
            f"{path} has checkpoint format {version!r}, and this nanochat reads up to {CHECKPOINT_FORMAT}: "
            "use the newer nanochat that wrote it."
        )
    return checkpoint


def build_gpt(config: GPTConfig, weights: dict[str, Tensor], source: str | Path = "the weights") -> GPT:
    """A GPT that holds `weights` themselves (no copy, no initialisation).

    Raises `UserError`, naming `source`, when names or shapes are not those of `config`.
    """
    with torch.device("meta"):
        gpt = GPT(config)
    expected = gpt.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is not a tensor of this model" for name in weights if name not in expected]
    problems += [
        f"{name} is {_shape(weights[name])} instead of {_shape(tensor)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{source} does not fit the model's configuration: {'; '.join(problems[:3])}{more}.")
    gpt.load_state_dict(weights, assign=True)
    device = gpt.embedding.weight.device
    cos, sin = rope_table(config.seq_len, config.head_dim, config.rope_base)
    gpt.cos, gpt.sin = cos.to(device), sin.to(device)
    for module in gpt.modules():
        if isinstance(module, HyperConnection):
            module.reset_table(device)
    return gpt


def load_run(path: str | Path, which: str | int = "last", device: str | torch.device = "cpu") -> Run:
    """Read a trained model.

    Args:
        path: a run folder, a link to one (`outputs/latest`), or a `.ckpt` file.
        which: "last" or an optimizer step, where `path` is a folder.
        device: where the weights go.

    Raises:
        UserError: no run or checkpoint there, a truncated or corrupt file, a newer format, or weights that
        do not
            fit the run's `model.json`.
    """
    folder, checkpoint_path = find_checkpoint(path, which)
    config = GPTConfig.from_json(folder / "model.json")
    checkpoint = read_checkpoint(checkpoint_path)
    state = checkpoint["state_dict"]
    weights = {
        name.removeprefix(GPT_PREFIX): tensor.to(device)
        for name, tensor in state.items()
        if name.startswith(GPT_PREFIX)
    }
    gpt = build_gpt(config, weights, source=checkpoint_path).eval()
    objectives = {
        name.removeprefix(OBJECTIVES_PREFIX): tensor.to(device)
        for name, tensor in state.items()
        if name.startswith(OBJECTIVES_PREFIX)
    }
    meta = {
        "step": checkpoint.get("global_step", 0),
        "hyper_parameters": checkpoint.get("hyper_parameters", {}),
    }
    return Run(folder, checkpoint_path, gpt, config, objectives, meta)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return re.sub(r"\s+", " ", text[0])[:120].rstrip(".") if text else type(error).__name__
