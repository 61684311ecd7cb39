"""A sample of text at each validation."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch.distributed.fsdp import FSDPModule

from nanochat import ranks
from nanochat.errors import UserError
from nanochat.files import atomic_write
from nanochat.inference import Sampling
from nanochat.training.callbacks.base import validation_due
from nanochat.training.sharded_text import write_text

log = logging.getLogger(__name__)

PROMPT_TOKENS = 16
HEADING = re.compile(r"^## Step (\d+)$", re.MULTILINE)


class TextSampler(Callback):
    """Lets the model write at each validation, into samples.md, and shows the first sample.

    A resume drops the samples beyond its checkpoint. Ranks that share the model compute the samples together, and rank
    0 records them; otherwise rank 0 alone has this callback.

    Args:
        prompts: None: two beginnings out of the validation text; none at all: no samples.
        max_tokens: the longest sample.
        temperature, top_k, top_p: of sampling.
        seed: of its own generators; training draws nothing from them.
    """

    def __init__(
        self,
        prompts: Sequence[str] | None = None,
        max_tokens: int = 96,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        if max_tokens < 1:
            raise UserError(f"callbacks.sampler.max_tokens={max_tokens} must be at least 1.")
        self.prompts, self.max_tokens, self.seed = prompts, max_tokens, seed
        self.sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = _path(trainer)
        if ranks.rank() or not path.exists():
            return
        # a validation that is made up for writes its sample again: the old one may have been cut off
        last = trainer.global_step - validation_due(trainer)
        text = path.read_text(encoding="utf-8", errors="replace")
        beyond = next((found.start() for found in HEADING.finditer(text) if int(found[1]) > last), None)
        if beyond is None:
            return
        try:
            with atomic_write(path) as file:
                file.write(text[:beyond].encode())
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from error

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        prompts = self._prompts(trainer) if ranks.rank() == 0 else None
        if isinstance(pl_module, FSDPModule):
            prompts = ranks.same(prompts)
        if prompts is None:
            return
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        try:
            texts = write_text(pl_module, tokenizer, prompts, self.max_tokens, self.sampling, self.seed)
        except UserError as error:
            log.warning("No sample at step %d: %s", trainer.global_step, error)
            return
        if ranks.rank() == 0:
            _record(trainer, prompts, texts)

    def _prompts(self, trainer: Trainer) -> list[str] | None:
        """What to continue; None where no sample is due."""
        data: LightningDataModule = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.sanity_checking or data.token_bytes() is None:  # type: ignore[attr-defined]
            return None
        path = _path(trainer)
        if path.exists() and _heading(trainer) in path.read_text(encoding="utf-8"):
            return None  # a finished run is validated again
        if self.prompts is not None:
            return list(self.prompts) or None
        rows = next(iter(data.val_dataloader()))["tokens"]
        special = data.eot_id  # type: ignore[attr-defined]
        starts = [[t for t in row[:PROMPT_TOKENS].tolist() if t != special] for row in (rows[0], rows[-1])]
        return list(dict.fromkeys(data.tokenizer.decode(start) for start in starts))  # type: ignore[attr-defined]


def _path(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "samples.md"


def _heading(trainer: Trainer) -> str:
    return f"## Step {trainer.global_step}\n"


def _record(trainer: Trainer, prompts: Sequence[str], texts: Sequence[str]) -> None:
    """Append the samples of a validation to the file, show the first one, and hand all to the loggers."""
    path = _path(trainer)
    loss = trainer.callback_metrics.get("val/loss")
    parts = [_heading(trainer)] if loss is None else [_heading(trainer), f"val/loss {float(loss):.4f}\n"]
    parts += [f"Prompt: {prompt!r}\n\n{fenced(prompt + text)}\n" for prompt, text in zip(prompts, texts, strict=True)]
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("\n".join(parts) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    log.info("Sample at step %d:\n%s", trainer.global_step, prompts[0] + texts[0])
    for logger in trainer.loggers:
        if hasattr(logger, "log_text"):
            rows = [[trainer.global_step, p, t] for p, t in zip(prompts, texts, strict=True)]
            columns = ["step", "prompt", "text"]
            logger.log_text("samples", columns=columns, data=rows, step=trainer.global_step)  # type: ignore[attr-defined]


def fenced(text: str) -> str:
    """A block of Markdown code that the text cannot end."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"
