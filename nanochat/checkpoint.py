"""Reading a trained model back: run folder -> network, tokenizer, configuration.

A run folder holds `model.json` (GPTConfig), `tokenizer.json` and `checkpoints/{step=N,last}.ckpt`. A
checkpoint is Lightning's dictionary; its `state_dict` has the network under `gpt.` and what the objectives
own (an MTP head) under `objectives.`. Neither Hydra nor Lightning is needed to read it.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import pickletools
import re
import textwrap
import zipfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanochat import run_lock
from nanochat.errors import UserError
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.model.hyper_connections import HyperConnection
from nanochat.model.rotary import rope_table
from nanochat.run_folder import find_checkpoint, step_checkpoints

if TYPE_CHECKING:
    from nanochat.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 1
"""value of a checkpoint's `nanochat_format` key; a reader refuses greater ones"""

GPT_PREFIX = "gpt."
OBJECTIVES_PREFIX = "objectives."

PICKLE_HEAD = 1 << 20
"""bytes of a bare pickle that are looked through for code"""
TENSOR_NAMES = re.compile(r"torch\._utils\._rebuild_\w+|torch\.\w*Storage|collections\.OrderedDict")
"""what a bare pickle of tensors refers to, as torch wrote it before its archives"""

_warned: set[Path] = set()
"""folders of runs that were said to be still running"""


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


class DamagedCheckpointError(UserError):
    """A checkpoint file is truncated or its bytes have changed."""


def read_checkpoint(path: str | Path, mmap: bool = True) -> dict[str, Any]:
    """A checkpoint's dictionary with its tensors on the CPU; nothing in it is executed.

    Args:
        path: the file.
        mmap: map the tensors from the file instead of reading them; they must not outlive it.

    Raises:
        DamagedCheckpointError: the file is truncated, or does not match its checksums.
        UserError: it holds code, is of a newer format, or is not a checkpoint.
    """
    check_whole(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a pickle can make the unpickler raise anything
        _refuse_code(path)
        raise DamagedCheckpointError(
            f"{path} is truncated, damaged, or not a nanochat checkpoint: {_first_sentence(error)}"
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


def check_whole(path: str | Path) -> None:
    """Compare every record of a checkpoint with its CRC-32, which `torch.save` writes and `torch.load` ignores.

    A file is checked once in a process, unless it changes.

    Raises:
        DamagedCheckpointError: a checksum does not match, or the file is not a whole archive.
        UserError: the file cannot be opened, or is a bare pickle that holds code.
    """
    try:
        found = os.stat(path)
        damaged = _damaged_record(os.path.realpath(path), found.st_ino, found.st_size, found.st_mtime_ns)
    except Exception as error:  # damaged headers can make the reader raise anything
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error
        _refuse_code(path)
        raise DamagedCheckpointError(f"{path} is truncated, damaged, or not a nanochat checkpoint.") from error
    if damaged is not None:
        raise DamagedCheckpointError(f"{path} is damaged: the checksum of {damaged} does not match.")


@functools.lru_cache(maxsize=64)
def _damaged_record(path: str, *_identity: int) -> str | None:
    with zipfile.ZipFile(path) as archive:
        if not any(record.CRC for record in archive.infolist()):  # torch.serialization.set_crc32_options(False)
            log.warning("%s has no checksums: damage in it would go unnoticed.", path)
            return None
        return archive.testzip()


def _refuse_code(path: str | Path) -> None:
    """Raise `UserError` when the file is a pickle that would call or make more than tensors and plain values."""
    if names := _code_in(path):
        raise UserError(f"{path} holds code ({', '.join(names)}); refused, and nothing of it was executed.")


def _code_in(path: str | Path) -> list[str]:
    """At most three names."""
    try:
        if zipfile.is_zipfile(path):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))[:3]
        with open(path, "rb") as file:
            head = file.read(PICKLE_HEAD)
    except Exception:  # not even a pickle
        return []
    return [name for name in _names_in_pickles(head) if not TENSOR_NAMES.fullmatch(name)][:3]


def _names_in_pickles(content: bytes) -> list[str]:
    """The dotted names that bare pickles, one after the other, refer to; their opcodes are read, none is executed."""
    names: list[str] = []
    texts: list[str] = []
    file = io.BytesIO(content)
    try:
        while not content.startswith(b"PK"):  # half an archive is none
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST"):
                    names.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":  # of the last two texts
                    names.append(".".join(texts[-2:]))
                elif isinstance(argument, str):
                    texts.append(argument)
    except Exception:  # cut off, at the end, or not a pickle
        pass
    return [name for name in dict.fromkeys(names) if re.fullmatch(r"\w+(\.\w+)+", name)]


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
    """Read a trained model; a warning says so when its run is still training.

    Args:
        path: a run folder, a link to one (`outputs/latest`), or a `.ckpt` file.
        which: "last" or an optimizer step, where `path` is a folder.
        device: where the weights go.

    Raises:
        UserError: no run or checkpoint there, a damaged file, a newer format, or weights that do not fit the run's
            `model.json`.
    """
    folder, checkpoint_path = find_checkpoint(path, which)
    config = GPTConfig.from_json(folder / "model.json")
    try:
        checkpoint = read_checkpoint(checkpoint_path)
    except DamagedCheckpointError as error:
        others = step_checkpoints(folder / "checkpoints")
        older = [step for step, file in others.items() if not os.path.samefile(file, checkpoint_path)]
        if Path(path).is_file() or not older:
            raise
        raise DamagedCheckpointError(f"{error} --checkpoint {older[0]} reads an older one of the run.") from error
    state = checkpoint["state_dict"]
    weights = {
        name.removeprefix(GPT_PREFIX): _wide(tensor.to(device))
        for name, tensor in state.items()
        if name.startswith(GPT_PREFIX)
    }
    gpt = build_gpt(config, weights, source=checkpoint_path).eval()
    objectives = {
        name.removeprefix(OBJECTIVES_PREFIX): _wide(tensor.to(device))
        for name, tensor in state.items()
        if name.startswith(OBJECTIVES_PREFIX)
    }
    meta = {
        "step": checkpoint.get("global_step", 0),
        "hyper_parameters": checkpoint.get("hyper_parameters", {}),
    }
    _warn_if_running(folder, meta)
    return Run(folder, checkpoint_path, gpt, config, objectives, meta)


def _wide(weight: Tensor) -> Tensor:
    """In float32 what was trained in bfloat16: the same numbers, as everything that reads a run expects them."""
    return weight.float() if weight.dtype == torch.bfloat16 else weight


def _warn_if_running(folder: Path, meta: dict[str, Any]) -> None:
    """Once for each run in a process: a model of few steps is easily taken for the finished one."""
    if folder.resolve() in _warned or run_lock.holder(folder) is None:
        return
    _warned.add(folder.resolve())
    steps = ((meta["hyper_parameters"].get("cfg") or {}).get("trainer") or {}).get("max_steps", "?")
    end = "" if steps == -1 else f" of {steps}"  # -1: the run ends with its time
    log.warning("%s is still running: this is step %s%s.", folder, meta["step"], end)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _first_sentence(error: Exception) -> str:
    """With its full stop; never cut in the middle of a word."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    sentence = re.split(r"(?<=[.!?]) ", " ".join(lines[0].split()), maxsplit=1)[0].rstrip(".")
    return f"{textwrap.shorten(sentence, 200, placeholder=' ...')}."
