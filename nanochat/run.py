"""A run, from its configuration to its metrics, on one page: check -> build -> fit -> report."""

from __future__ import annotations

import copy
import gc
import logging
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from lightning import Callback, Trainer
from omegaconf import DictConfig, OmegaConf

from nanochat.config import check
from nanochat.data import DataModule
from nanochat.errors import UserError
from nanochat.lightning.callbacks.guard import NonFiniteError
from nanochat.lightning.module import NanoChatModule, model_config
from nanochat.lightning.resume import check_resume, find_checkpoint
from nanochat.report import Report

log = logging.getLogger(__name__)


def train(cfg: DictConfig, folder: Path | None = None) -> dict[str, float]:
    """Train what the configuration says; everything of the run lands in its folder.

    Args:
        cfg: the composed configuration.
        folder: the run's folder; by default the one that Hydra made.

    Returns:
        the final metrics, `val/bpb` among them.

    Raises:
        ConfigError, UserError: before anything is built or written, or when the data, the machine or a checkpoint
            cannot be used.
        SystemExit: 130 or 143, when a signal ended the run after it was saved.
    """
    check(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir) if folder is None else Path(folder)
    plain = settle(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    lightning.seed_everything(plain["seed"], verbose=False)

    data = build_data(plain)
    data.prepare_data()
    fit_vocabulary(plain, data)
    config = model_config(plain)
    checkpoint = find_checkpoint(folder, plain["ckpt_path"])
    if checkpoint is not None:
        check_resume(checkpoint, plain)
    write_run_files(folder, cfg, plain, data)
    config.to_json(folder / "model.json")

    report = Report(folder, plain, data)
    trainer: Trainer | None = None
    loggers: list[Any] = []
    try:
        loggers = [instantiate(node) for node in (plain.get("logger") or {}).values() if node]
        while True:
            module = NanoChatModule(plain)
            trainer = build_trainer(plain, folder, loggers)
            try:
                trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
                break
            except NonFiniteError as error:
                plain["rate_scale"] = error.next_rate_scale(plain.get("rate_scale", 1.0))
                checkpoint = find_checkpoint(folder, "auto")
                log.warning("%s Going back to %s.", error, checkpoint or "the start")
                data = build_data(plain)
                data.prepare_data()
        if trainer.interrupted:
            raise KeyboardInterrupt
        return report.finish(trainer, module)
    except BaseException as error:
        report.abort(trainer, error)
        raise
    finally:
        clean_up(loggers)


def build_data(plain: dict[str, Any]) -> DataModule:
    """The data with its tokenizer.

    In two calls, since Hydra would turn the tokenizer's specification, a dataclass, into a dictionary.
    """
    return instantiate(plain["data"], _partial_=True, _convert_="all")(tokenizer=instantiate(plain["tokenizer"]))


def settle(plain: dict[str, Any]) -> dict[str, Any]:
    """Decide every `auto` from the machine, and count validation intervals in optimizer steps."""
    plain = copy.deepcopy(plain)
    trainer = plain["trainer"]
    if trainer.get("accelerator", "auto") == "auto":
        trainer["accelerator"] = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    if trainer.get("precision") == "auto":
        trainer["precision"] = "bf16-mixed" if trainer["accelerator"] in ("cuda", "gpu") else "32-true"
    if plain.get("compile", "auto") == "auto":
        plain["compile"] = trainer["accelerator"] in ("cuda", "gpu")
    return plain


def fit_vocabulary(plain: dict[str, Any], data: DataModule) -> None:
    """Give a model of vocabulary `auto` the tokenizer's; refuse a model that is too small for its tokenizer."""
    size, model = data.vocab_size, plain["model"]
    if model["vocab_size"] == "auto":
        model["vocab_size"] = size
    elif size > model["vocab_size"]:
        raise UserError(
            f"the tokenizer has {size} tokens, the model only model.vocab_size={model['vocab_size']}; "
            "make the tokenizer smaller (tokenizer.vocab_size) or say model.vocab_size=auto."
        )
    elif size < model["vocab_size"]:
        log.warning(
            "The tokenizer has %d of the model's %d tokens; the rest of the head stays unused "
            "(model.vocab_size=auto takes the tokenizer's).",
            size,
            model["vocab_size"],
        )


def write_run_files(folder: Path, cfg: DictConfig, plain: dict[str, Any], data: DataModule) -> None:
    """config.yaml (kept as it was on a resume) and tokenizer.json."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.yaml").exists():
            resolved = OmegaConf.create({k: v for k, v in plain.items() if k in cfg})
            OmegaConf.save(resolved, folder / "config.yaml")
        data.tokenizer.save(folder / "tokenizer.json")
    except OSError as error:
        raise UserError(f"the run folder {folder} cannot be written: {error.strerror}.") from error


def build_trainer(plain: dict[str, Any], folder: Path, loggers: list[Any]) -> Trainer:
    """The Trainer with the configured callbacks, and the features that are callbacks."""
    nodes = dict(plain.get("callbacks") or {})
    for name, node in plain.items():
        if isinstance(node, dict) and str(node.get("_target_", "")).startswith("nanochat.objectives."):
            target = get_class(node["_target_"])
            if issubclass(target, Callback):
                nodes[name] = node
    options = dict(plain["trainer"])
    if isinstance(options.get("val_check_interval"), int):
        # Lightning counts micro-batches; ours are optimizer steps
        options["val_check_interval"] *= options.get("accumulate_grad_batches", 1)
    return instantiate(
        options,
        callbacks=[instantiate(node) for node in nodes.values() if node],
        logger=loggers or False,
        default_root_dir=str(folder),
        enable_checkpointing=False,
    )


def clean_up(loggers: list[Any]) -> None:
    """Leave nothing of this run behind for the next job of a sweep, which shares the process."""
    for logger in loggers:
        if type(logger).__name__ == "WandbLogger":
            logger.experiment.finish()
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
