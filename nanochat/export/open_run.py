"""The one place where a RUN argument becomes a model: a run folder, a `.ckpt`, a GGUF file, or `zoo:NAME`."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

import torch

from nanochat.checkpoint import Run, build_gpt, load_run
from nanochat.errors import UserError
from nanochat.export.gguf_reader import GGUFFile
from nanochat.export.read_back import latent_weights, read_export
from nanochat.run_folder import check_no_step
from nanochat.zoo.store import located


def open_run(path: str | Path, which: str | int = "last", device: str | torch.device = "cpu") -> Run:
    """A trained model from wherever it lies.

    A GGUF file gives the network that was trained, with the values that the file holds: ternary matrices are equal to
    the last bit, tables are rounded to the file's type. Its tokenizer and chat template are put in a temporary folder,
    which is the run's `folder`.

    Args:
        path: a run folder, a link to one, a `.ckpt` or `.gguf` file, or `zoo:NAME`.
        which: "last" or an optimizer step, where `path` is a run folder.
        device: where the weights go.

    Raises:
        UserError: nothing there, a damaged file, a GGUF file that nanochat did not write, or a step beside a file.
    """
    path = located(path)
    if path.suffix != ".gguf":
        return load_run(path, which, device)
    check_no_step(path, which)
    exported = read_export(path)
    weights, objectives = latent_weights(exported)
    gpt = build_gpt(exported.config, {name: tensor.to(device) for name, tensor in weights.items()}, source=path)
    objectives = {name: tensor.to(device) for name, tensor in objectives.items()}
    folder = Path(tempfile.mkdtemp(prefix="nanochat-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    name = write_texts(path, exported.tokenizer, folder)
    meta = {"step": exported.step, "hyper_parameters": {"task_name": name}}
    return Run(folder, path, gpt.eval(), exported.config, objectives, meta)


def write_texts(path: Path, tokenizer: str | None, folder: Path) -> str:
    """Put the tokenizer and the chat template of a GGUF file into a folder, as a run has them; returns its name."""
    if tokenizer is None:
        raise UserError(f"{path} has no tokenizer, so its tokens cannot be turned into text.")
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    with GGUFFile(path) as file:
        template = file.metadata.get("tokenizer.chat_template")
        name = file.metadata.get("general.name")
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return name if isinstance(name, str) and name else path.stem
