"""Is an exported file whole, and does it compute what the run computes?"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.checkpoint import Run
from nanochat.errors import UserError
from nanochat.export import llama_cpp
from nanochat.export.gguf import check_keys
from nanochat.export.gguf_reader import GGUFFile
from nanochat.export.gguf_tensors import OWN, mtp_heads, plan_tensors
from nanochat.export.huggingface import read_config
from nanochat.export.packing import FLOAT_TYPES
from nanochat.export.read_back import Exported, network, read_export
from nanochat.inference.engine import Decoder, inference_copy
from nanochat.inference.sampling import Sampling, sample
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.zoo.store import located

EXACT = 5e-3
"""largest difference of a logit where both sides compute with the same weights and float activations"""
CLOSE = 0.01
"""largest relative difference of the mean NLL elsewhere"""


@dataclass
class Comparison:
    """Logits of two programs on the same tokens."""

    what: str
    largest: float
    """largest absolute difference of a logit"""
    same_top: float
    """share of positions with the same most likely token"""
    nll: tuple[float, float]
    """mean NLL of the tokens, nats, on either side"""
    passed: bool

    def __str__(self) -> str:
        mark = "ok  " if self.passed else "FAIL"
        return (
            f"{mark}  {self.what}: max |difference of logits| {self.largest:.2e}, same top token at "
            f"{100 * self.same_top:.1f}%, NLL {self.nll[0]:.4f} and {self.nll[1]:.4f}"
        )


@dataclass
class Verification:
    """Everything that `verify` found."""

    path: Path
    description: str
    sha256: str
    tensors: list[tuple[str, str, tuple[int, ...]]]
    """name, type, shape"""
    comparisons: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """whether every comparison held"""
        return all(comparison.passed for comparison in self.comparisons)


def compare_logits(what: str, ours: np.ndarray, theirs: np.ndarray, tokens: Tensor, exact: bool) -> Comparison:
    """Compare logits (T, V) after each of `tokens` (T,)."""
    first, second = (float(F.cross_entropy(torch.from_numpy(x[:-1]), tokens[1:])) for x in (ours, theirs))
    largest = float(np.abs(ours - theirs).max())
    same = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    passed = largest <= EXACT if exact else abs(second - first) <= CLOSE * abs(first) + 1e-3
    return Comparison(what, largest, same, (first, second), bool(passed and np.isfinite(largest)))


@torch.inference_mode()
def own_text(gpt: GPT, length: int, vocab: int, first: int, seed: int = 0) -> Tensor:
    """Tokens that the network itself writes at temperature 1, so that their likelihood says something."""
    decoder = Decoder(gpt, 1, length)
    generator = torch.Generator().manual_seed(seed)
    tokens = [first]
    while len(tokens) < length:
        logits = decoder.feed(torch.tensor([tokens[-1:]]))[:, :vocab]
        tokens.append(int(sample(logits, Sampling(1.0), [generator])))
    return torch.tensor(tokens)


@torch.inference_mode()
def logits_of(gpt: GPT, tokens: Tensor, activation_scale: str) -> np.ndarray:
    """(T,) -> (T, V), with the given rounding of activations."""
    return inference_copy(gpt, activation_scale)(tokens[None])[0].numpy()


def check_structure(path: Path, exported: Exported) -> list[tuple[str, str, tuple[int, ...]]]:
    """Every tensor of a GGUF file, compared with what this network must have.

    Raises `UserError` that names the first tensor or key which is missing, superfluous, or of another type or shape.
    """
    with GGUFFile(path) as file:
        original = original_config(file)
        nextn = mtp_heads(exported.objectives)
        check_keys(file, original, exported.architecture, exported.type, nextn)
        with torch.device("meta"):
            shapes = GPT(original).state_dict()
        found_embedding = file.tensors["token_embd.weight"].type.lower()
        plans = plan_tensors(original, shapes, exported.architecture, exported.type, found_embedding, nextn)
        expected = {plan.name: (plan.type.upper(), plan.shape) for plan in plans}
        for name, (kind, shape) in expected.items():
            if name not in file.tensors:
                raise UserError(f"{path} has no tensor {name!r}.")
            found = file.tensors[name]
            if (found.type, found.shape) != (kind, shape):
                raise UserError(
                    f"{path}: tensor {name!r} is {found.type} {list(found.shape)} instead of {kind} {list(shape)}."
                )
        for name in file.tensors:
            if name not in expected:
                raise UserError(f"{path} has the tensor {name!r}, which this network lacks.")
        return [(tensor.name, tensor.type, tensor.shape) for tensor in file.tensors.values()]


def original_config(file: GGUFFile) -> GPTConfig:
    """The configuration of the network that was exported into a file."""
    return read_config(json.loads(file.get("nanochat.config", str)), file.path)


def verify(path: str | Path, run: Run | None = None, *, length: int = 256) -> Verification:
    """Check an exported file.

    Structure: every tensor, type, shape and key. Parity, on `length` tokens that the network writes itself: the
    run's logits against the file's in our own engine, and the file's in our engine against those in llama.cpp where
    it is installed.

    Raises:
        UserError: a file that is missing, damaged, or of another program.
    """
    path = located(path)
    exported = read_export(path)
    gguf = exported.type != "safetensors"
    content = path if gguf else exported.path / "model.safetensors"
    with content.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if gguf:
        tensors = check_structure(path, exported)
    else:
        tensors = [(name, "F32", tuple(tensor.shape)) for name, tensor in exported.weights.items()]
    kinds = Counter(kind for _, kind, _ in tensors)
    summary = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    found = Verification(path, f"{exported.architecture}, {exported.type}, tensors: {summary}", digest, tensors)
    gpt = network(exported)
    for name, parameter in [*gpt.named_parameters(), *exported.objectives.items()]:
        if not torch.isfinite(parameter).all():
            raise UserError(f"{path}: {name} has values that are not finite.")
    length = min(length, exported.config.seq_len)
    if length < 2:
        found.notes.append("the context is too short for a comparison of logits")
        return found
    tokens = own_text(gpt, length, exported.config.vocab_size, first=0)
    float_embedding = all(kind != "Q8_0" for _, kind, _ in tensors)
    if run is not None:
        _compare_with_run(found, run, gpt, tokens, exact=float_embedding and exported.type != "f16")
    if gguf and exported.architecture != OWN:
        _compare_with_llama_cpp(found, gpt, exported, tokens)
    return found


def _compare_with_run(found: Verification, run: Run, gpt: GPT, tokens: Tensor, exact: bool) -> None:
    if run.config.vocab_size != gpt.config.vocab_size or run.config.seq_len < len(tokens):
        raise UserError(f"{found.path} is not an export of {run.folder}: vocabulary or context differ.")
    ours, theirs = logits_of(run.gpt, tokens, "none"), logits_of(gpt, tokens, "none")
    found.comparisons.append(compare_logits(f"run {run.folder} and the file", ours, theirs, tokens, exact))


def _compare_with_llama_cpp(found: Verification, gpt: GPT, exported: Exported, tokens: Tensor) -> None:
    try:
        llama_cpp.load()
    except llama_cpp.LlamaCppUnavailable as error:
        found.notes.append(f"not compared with llama.cpp: {error}")
        return
    with llama_cpp.LlamaModel(found.path, context=len(tokens)) as model:
        theirs = model.logits(tokens.tolist())
    # with ternary types llama.cpp rounds activations to int8, by its own blocks
    exact = exported.type in FLOAT_TYPES
    ours = logits_of(gpt, tokens, "none" if exact or not exported.config.ternary else "block")
    found.comparisons.append(compare_logits(f"the file and llama.cpp {llama_cpp.RELEASE}", ours, theirs, tokens, exact))
