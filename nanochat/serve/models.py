"""From a run or a file to a model that answers: which backend, which tokens, which template."""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint import Run, load_run
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import UserError
from nanochat.export import llama_cpp
from nanochat.export.gguf import architecture, default_type, export_gguf
from nanochat.export.gguf_reader import GGUFFile
from nanochat.export.gguf_tensors import OWN
from nanochat.inference.engine import inference_copy
from nanochat.inference.slots import Backend, TorchBackend
from nanochat.inference.speculative import build_heads, drafting_backend
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.run_folder import check_no_step
from nanochat.serve.codec import Codec, LlamaCodec, RunCodec
from nanochat.serve.llama import LlamaBackend
from nanochat.serve.template import ChatTemplate, template_of
from nanochat.zoo.store import located

BACKENDS = ("auto", "torch", "llama.cpp")
SPECULATE = ("auto", "on", "off")


@dataclass
class Model:
    """A model that can be served."""

    name: str
    backend: Backend
    codec: Codec
    template: ChatTemplate
    source: str
    """what it was loaded from"""
    note: str = ""
    """why it is not with the backend that one would expect"""

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of a conversation, ready for the assistant's next answer.

        Raises `UserError` for messages that the template refuses, or text that is not Unicode.
        """
        begin, tokens = self.codec.begin, self.codec.encode(self.template.render(messages), special=True)
        # a template may write the beginning of a text itself
        return tokens if tokens[: len(begin)] == begin else [*begin, *tokens]

    @property
    def is_chat(self) -> bool:
        """Whether it came with a chat template; a base model only continues text."""
        return self.template.own


@dataclass(frozen=True)
class Settings:
    """How models are loaded.

    `context`: tokens of each slot, None for the model's own. `own_first`: the backend `auto` takes our engine for what
    nanochat wrote, also where llama.cpp could run it. `speculate`: whether the heads of multi-token prediction draft,
    `auto` where that pays.
    """

    backend: str = "auto"
    slots: int = 4
    context: int | None = None
    device: torch.device | str = "cpu"
    checkpoint: str = "last"
    own_first: bool = False
    speculate: str = "auto"


def load_model(path: str | Path, settings: Settings | None = None, name: str | None = None) -> Model:
    """Read a run folder, a `.ckpt` or a `.gguf` file, or `zoo:NAME`.

    Raises `UserError` for what is not there or cannot be run, naming the option that would help.
    """
    settings, path = settings or Settings(), located(path)
    if settings.backend not in BACKENDS:
        raise UserError(f"--backend {settings.backend} is unknown; choose one of {', '.join(BACKENDS)}.")
    if path.suffix == ".gguf":
        return _load_file(path, settings, name or path.stem)
    run = load_run(path, settings.checkpoint, settings.device)
    name = name or run.folder.resolve().name
    codec = RunCodec(run.tokenizer)
    if codec.vocab_size > run.config.vocab_size:
        raise UserError(
            f"{run.folder}/tokenizer.json has {codec.vocab_size} tokens, more than the model's "
            f"{run.config.vocab_size}: they do not belong together."
        )
    backend, note = _backend_of(run, settings)
    return Model(name, backend, codec, template_of(run.folder), str(path), note)


def _backend_of(run: Run, settings: Settings) -> tuple[Backend, str]:
    """The backend of a run, and why it is not llama.cpp if it could have been."""
    context, note = _context(settings, run.config.seq_len), ""
    limit = run.tokenizer.vocab_size
    if settings.backend == "llama.cpp" or (settings.backend == "auto" and not settings.own_first):
        try:
            llama_cpp.load()
            path = cached_gguf(run)
            return LlamaBackend(path, settings.slots, context, torch.get_num_threads(), limit), ""
        except UserError as error:
            if settings.backend == "llama.cpp":
                raise
            note = f"not with llama.cpp: {error}"
    gpt = inference_copy(run.gpt)
    return _torch_backend(gpt, run.config, run.objectives, settings, context, limit, run.folder), note


def _torch_backend(
    gpt: GPT,
    config: GPTConfig,
    objectives: Mapping[str, torch.Tensor],
    settings: Settings,
    context: int,
    limit: int,
    source: Path,
) -> TorchBackend:
    """Our engine, with the drafts of the heads of multi-token prediction where `settings.speculate` says so."""
    heads = []
    if settings.speculate != "off":
        try:
            heads = build_heads(config, objectives, gpt.embedding.weight.dtype)
        except UserError:  # heads that cannot draft
            if settings.speculate == "on":
                raise
    if heads:
        measured = settings.speculate == "auto"
        return drafting_backend(gpt, heads, settings.slots, context, limit, measured=measured)
    if settings.speculate == "on":
        raise UserError(
            f"{source} has no heads that could draft: it was trained without +mtp=on (kind sequential). "
            "Leave --speculate out."
        )
    return TorchBackend(gpt, settings.slots, context, limit)


def _context(settings: Settings, longest: int) -> int:
    if settings.context is not None and settings.context > longest:
        raise UserError(f"--context {settings.context} is more than the {longest} tokens that the model was made for.")
    return settings.context or longest


def cached_gguf(run: Run) -> Path:
    """The run's network as a GGUF file, written on first use and again when the checkpoint has changed.

    It lies in the run folder under `serve/`; where that cannot be written, in a temporary folder. Raises
    `UserError` when llama.cpp cannot run the network.
    """
    architecture(run.config)
    kind = default_type(run.config)
    state = run.checkpoint.stat()
    tokenizer = (run.folder / "tokenizer.json").read_bytes()
    template = template_of(run.folder)
    facts = f"{state.st_mtime_ns} {state.st_size} {template.source} {hashlib.sha256(tokenizer).hexdigest()}"
    stem = run.checkpoint.stem.replace("=", "-")
    folder = run.folder / "serve"
    path = folder / f"{stem}-{kind}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}.gguf"
    if path.is_file():
        return path
    if not _writable(folder):
        path = _temporary_folder() / path.name
        export_gguf(run, path, kind, mtp=False, force=True)
        return path
    export_gguf(run, path, kind, mtp=False, force=True)
    for old in folder.glob(f"{stem}-*.gguf"):
        if old != path:
            old.unlink(missing_ok=True)
    return path


def _writable(folder: Path) -> bool:
    """Whether a folder is there, or can be made, and takes files."""
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _temporary_folder() -> Path:
    """A folder that is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="nanochat-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _load_file(path: Path, settings: Settings, name: str) -> Model:
    """A GGUF file, with the first backend that can run it."""
    if not path.is_file():
        raise UserError(f"there is no file {path}.")
    with GGUFFile(path) as file:
        own = file.get("general.architecture", str) == OWN
        readable = "nanochat.config" in file.metadata
        source = file.metadata.get("tokenizer.chat_template")
    if settings.backend == "llama.cpp" and own:
        raise UserError(f"stock llama.cpp cannot run {path}: it was exported with --to nanochat; use --backend torch.")
    if settings.backend == "torch" and not readable:
        raise UserError(
            f"{path} was not written by nanochat, so llama.cpp alone can run it, on the CPU and without drafts: leave "
            "--backend, --device and --speculate out."
        )
    check_no_step(path, settings.checkpoint)
    backends = [settings.backend]
    if settings.backend == "auto":
        possible = {"torch": readable, "llama.cpp": not own}
        ordered = ("torch", "llama.cpp") if settings.own_first else ("llama.cpp", "torch")
        backends = [backend for backend in ordered if possible[backend]]
    refused: dict[str, UserError] = {}
    for backend in backends:
        try:
            load = _own_file if backend == "torch" else _llama_file
            model = load(path, settings, name, source)
            notes = [f"not with {other}: {error}" for other, error in refused.items()]
            return dataclasses.replace(model, note="; ".join([*notes, model.note] if model.note else notes))
        except UserError as error:
            refused[backend] = error
    if not readable and isinstance(refused["llama.cpp"], llama_cpp.LlamaCppUnavailable):
        raise UserError(f"{path} was not written by nanochat, so it needs llama.cpp: {refused['llama.cpp']}")
    if len(refused) > 1:
        raise UserError("; ".join(f"with {backend}: {error}" for backend, error in refused.items()))
    raise next(iter(refused.values()))


def _llama_file(path: Path, settings: Settings, name: str, source: object) -> Model:
    """A GGUF file of any program, in llama.cpp."""
    llama_cpp.load()
    backend = LlamaBackend(path, settings.slots, settings.context, torch.get_num_threads())
    if not backend.model.has_vocabulary:
        backend.close()
        raise UserError(f"{path} has no tokenizer, so its tokens cannot be turned into text.")
    names = {f"{marker}_token": backend.model.marker(marker) for marker in ("bos", "eos")}
    template, note = ChatTemplate(), ""
    if isinstance(source, str):
        try:
            template = ChatTemplate(source, own=True, names=names)
        except UserError as error:
            note = f"conversations are written as ChatML: {error}"
    return Model(name, backend, LlamaCodec(backend.model), template, str(path), note)


def _own_file(path: Path, settings: Settings, name: str, source: object) -> Model:
    """A GGUF file that nanochat wrote, in our own engine."""
    from nanochat.export.read_back import latent_weights, network, read_export

    exported = read_export(path)
    if exported.tokenizer is None:
        raise UserError(f"{path} has no tokenizer, so its tokens cannot be turned into text.")
    codec = RunCodec(_tokenizer(exported.tokenizer))
    gpt = network(exported).to(settings.device)
    context = _context(settings, exported.config.seq_len)
    template = ChatTemplate(source, own=True) if isinstance(source, str) else ChatTemplate()
    objectives = latent_weights(exported)[1] if exported.objectives and settings.speculate != "off" else {}
    objectives = {key: tensor.to(settings.device) for key, tensor in objectives.items()}
    backend = _torch_backend(gpt, exported.config, objectives, settings, context, codec.vocab_size, path)
    return Model(name, backend, codec, template, str(path))


def _tokenizer(text: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "tokenizer.json"
        place.write_text(text, encoding="utf-8")
        return Tokenizer.load(place)
