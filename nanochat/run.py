"""A run, from its configuration to its metrics, on one page: check -> build -> fit -> report."""

from __future__ import annotations

import gc
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning import Callback, Trainer
from omegaconf import DictConfig, OmegaConf

from nanochat import ranks, run_lock
from nanochat.config.check import Checked, check
from nanochat.config.features import feature_nodes
from nanochat.config.overrides import RESUME
from nanochat.config.schema import set_by_user
from nanochat.config.vocabulary import build_data, fit_vocabulary
from nanochat.data import DataModule
from nanochat.device import default_precision, find_device, has_int8_products
from nanochat.environment import rank_count, ranks_started
from nanochat.errors import DivergedError, UserError
from nanochat.files import atomic_write, shown
from nanochat.model.config import int8_fits
from nanochat.optim.offload import leaves
from nanochat.reports.card import RunReport
from nanochat.reports.loggers import build_loggers, close_loggers
from nanochat.reports.origin import keep_command
from nanochat.search import Trial
from nanochat.training import launcher
from nanochat.training.alike import check_alike
from nanochat.training.callbacks.guard import NonFiniteError
from nanochat.training.callbacks.header import Header
from nanochat.training.callbacks.loss_plot import LossPlot
from nanochat.training.callbacks.metrics import MetricsCSV
from nanochat.training.callbacks.pending_validation import PendingValidation
from nanochat.training.callbacks.progress import ProgressBar
from nanochat.training.callbacks.pruning import Pruner
from nanochat.training.callbacks.sampler import TextSampler
from nanochat.training.callbacks.time_limit import TimeLimit
from nanochat.training.checkpoint_io import WholeFileIO
from nanochat.training.distributed import OwnersStrategy, ShardsStrategy
from nanochat.training.failures import in_words
from nanochat.training.fit import check_fits, choose_batch
from nanochat.training.module import NanoChatModule, model_config
from nanochat.training.resume import anchor_paths, check_resume, checkpoint_to_resume

log = logging.getLogger(__name__)

LENGTH = ("max_steps", "max_time")
"""values of the trainer that a resume may change for good"""
RANK_ZERO = (Header, LossPlot, MetricsCSV, ProgressBar)
"""callbacks that only tell of a run, which one rank does for all"""


def train(cfg: DictConfig | Checked, folder: Path | None = None) -> dict[str, float]:
    """Train what the configuration says; everything of the run lands in its folder.

    Args:
        cfg: the composed configuration, or what `check` made of it.
        folder: the run's folder; by default the one that Hydra made.

    Returns:
        the final metrics, `val/bpb` among them.

    Raises:
        ConfigError, UserError: before anything is built or written, or when the data, the machine or a checkpoint
            cannot be used.
        InUseError: another process trains in the folder.
        RankDiedError, RankFailedError: one of several ranks has ended before the run.
        DivergedError: the last validation's loss is not finite.
        LostDeviceError: a GPU or a connection failed (exit code 75).
        SystemExit: 130, 143 or 75, when a signal ended the run after it was saved.
    """
    checked = cfg if isinstance(cfg, Checked) else check(cfg)
    quieten()
    for warning in checked.warnings:
        log.warning("%s", warning)
    folder = Path(HydraConfig.get().runtime.output_dir) if folder is None else Path(folder)
    plain = settle(checked.values)
    if checked.auto_batch:
        plain = choose_batch(plain, folder)
    if warning := check_fits(plain):
        log.warning("%s", warning)
    device = find_device(plain["trainer"]["accelerator"])
    if plain.get("offload_optimizer") and not leaves(device):
        log.warning("offload_optimizer=true changes nothing on %s, which has no memory of its own.", device.type)
    lightning.seed_everything(plain["seed"], verbose=False)

    data = build_data(plain)
    data.setup("fit")
    fit_vocabulary(plain, data)
    model_config(plain)  # an impossible network is refused before anything is written
    with run_lock.hold(folder, try_later=plain["ckpt_path"] == "auto"):
        checkpoint = checkpoint_to_resume(folder, plain["ckpt_path"])
        if checkpoint is not None:
            check_resume(checkpoint, plain)
        write_run_files(folder, plain, data)
        count = rank_count(plain)
        if count == 1 and plain["trainer"].get("strategy") == "fsdp2":
            log.warning("trainer=fsdp2 has one rank here, so nothing is sharded: trainer.devices=N asks for more.")
        if count == 1:
            return fit(folder, plain, data, checkpoint)
        job = launcher.Job.here(plain, folder, checkpoint)
        if ranks_started() == 1:
            return launcher.run_ranks(job, count)
        launcher.lead(job)
        check_alike(plain, data)
        return fit(folder, plain, data, checkpoint)


def fit(folder: Path, plain: dict[str, Any], data: DataModule, checkpoint: Path | None) -> dict[str, float]:
    """Train from a checkpoint, or from the start, to the report; returns and raises as `train`."""
    limit = time_limit(plain)
    report, first = RunReport(folder, plain, data, limit), [*([limit] if limit else []), Header(plain, data)]
    pruner = None if (trial := Trial.here()) is None else Pruner(trial)
    tells = ranks.rank() == 0
    trainer: Trainer | None = None
    loggers: list[Any] = []
    rate_scale = 1.0
    try:
        loggers = build_loggers(plain, folder) if tells else []
        while True:
            module = NanoChatModule(plain, rate_scale)
            trainer = build_trainer(plain, folder, loggers, *first, pruner=pruner)
            try:
                trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
                break
            except NonFiniteError as error:
                rate_scale = error.next_rate_scale(module.rate_scale)
                checkpoint = checkpoint_to_resume(folder, "auto") or checkpoint
                log.warning("%s Going back to %s, with half the rates.", error, checkpoint or "the start")
                data = build_data(plain)
        if trainer.enable_validation and module.validated_at != trainer.global_step:
            trainer.validate(module, datamodule=data, verbose=False)
        check_finite(trainer)
        pruned = pruner is not None and pruner.pruned
        return report.finish(trainer, module, "pruned" if pruned else "finished") if tells else {}
    except SystemExit as error:
        if tells:
            report.abort(trainer, error)
        if isinstance(error.__context__, KeyboardInterrupt):  # without our signal handlers Lightning exits with 1
            raise SystemExit(130) from error
        raise
    except BaseException as error:
        if tells:
            report.abort(trainer, error)
        known = None if isinstance(error, UserError) else in_words(error, plain, *progress(trainer, folder))
        if known is None:
            raise
        if ranks.world() == 1:  # of several, each would show the traceback
            log.error("The run has failed.", exc_info=error)
        raise known from error
    finally:
        clean_up(loggers)


def progress(trainer: Trainer | None, folder: Path) -> tuple[int, str | None]:
    """Optimizer steps done, and the newest checkpoint."""
    last = folder / "checkpoints" / "last.ckpt"
    return 0 if trainer is None else trainer.global_step, shown(last) if last.is_file() else None


def check_finite(trainer: Trainer) -> None:
    """Raise `DivergedError` when the last validation's loss is not finite."""
    for name in ("val/bpb", "val/loss"):
        value = float(trainer.callback_metrics.get(name, 0.0))
        if not math.isfinite(value):
            raise DivergedError(
                f"training has diverged: {name} is {value} at step {trainer.global_step}; lower optim.lr, lengthen "
                "schedule.warmup_steps, or set trainer.gradient_clip_val."
            )


def quieten() -> None:
    """Keep Lightning's remarks about devices and its own products out of the log."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self.log\(.*sync_dist=True")  # it is summed
    # static hyper-connections do, and nothing writes into what a block returns
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def settle(plain: dict[str, Any]) -> dict[str, Any]:
    """Decide every `auto` from the machine, and every relative path from the working folder."""
    plain = anchor_paths(plain)
    trainer = plain["trainer"]
    if trainer.get("max_steps") is None or (plain["schedule"].get("horizon") == "time" and from_recipe("max_steps")):
        trainer["max_steps"] = -1
    accelerator = trainer.get("accelerator") or "auto"
    device = find_device(accelerator)
    if accelerator == "auto":
        trainer["accelerator"] = device.type
    if trainer.get("devices") == "auto":
        trainer["devices"] = torch.cuda.device_count() if device.type == "cuda" else 1
    if trainer.get("precision") == "auto":
        trainer["precision"] = default_precision(device)
    model = plain.get("model") or {}
    if model.get("int8") == "auto":
        model["int8"] = int8_fits(model) and has_int8_products(device)
    if plain.get("compile", "auto") == "auto":
        plain["compile"] = device.type == "cuda"
    return plain


def from_recipe(key: str) -> bool:
    """Whether a value of the trainer comes from conf/, neither from the command line nor from a resumed run."""
    if not HydraConfig.initialized() or HydraConfig.get().job.config_name == RESUME:
        return False
    return not set_by_user(f"trainer.{key}")


def write_run_files(folder: Path, plain: dict[str, Any], data: DataModule) -> None:
    """config.yaml, command.json, tokenizer.json and model.json.

    A resume keeps config.yaml but for the run's length (steps and time): a run that was extended and then interrupted
    trains to its new end, with the rates of the new length.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        resolved = OmegaConf.create({k: v for k, v in plain.items() if k != "rate_scale"})
        if path.exists():
            resolved, length = OmegaConf.load(path), {key: resolved.trainer.get(key) for key in LENGTH}
            resolved.trainer.update(length)
        with atomic_write(path) as file:
            file.write(OmegaConf.to_yaml(resolved).encode())
        keep_command(folder)
        data.tokenizer.save(folder / "tokenizer.json")
        model_config(plain).to_json(folder / "model.json")
    except OSError as error:
        raise UserError(f"the run folder {folder} cannot be written: {error.strerror}.") from error


def build_trainer(
    plain: dict[str, Any], folder: Path, loggers: list[Any], *first: Callback, pruner: Pruner | None = None
) -> Trainer:
    """The Trainer with the callbacks that come first, the configured ones, and the features that are callbacks."""
    nodes = [*(plain.get("callbacks") or {}).values(), *feature_nodes(plain, Callback).values()]
    options = dict(plain["trainer"])
    bar, _ = options.pop("enable_progress_bar", True), options.pop("max_time", None)  # see `time_limit`
    if isinstance(options.get("val_check_interval"), int):
        # Lightning counts micro-batches; ours are optimizer steps
        options["val_check_interval"] *= options.get("accumulate_grad_batches", 1)
    callbacks = [instantiate(node) for node in nodes if node]
    if not bar:
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    # after what records a validation
    callbacks = [*first, *callbacks, *([pruner] if pruner else []), PendingValidation()]
    sharded = options.pop("strategy", None) == "fsdp2"
    if ranks.rank():
        others = RANK_ZERO if sharded else (*RANK_ZERO, TextSampler)  # a model in parts writes with all of them
        callbacks = [callback for callback in callbacks if not isinstance(callback, others)]
    if ranks.world() > 1 and sharded:
        # weights that are gathered in inference mode first could not be trained
        options |= {"strategy": ShardsStrategy(), "inference_mode": False}
    elif ranks.world() > 1:
        options["strategy"] = OwnersStrategy()
    return instantiate(
        options,
        callbacks=callbacks,
        plugins=[*(options.pop("plugins", None) or []), WholeFileIO()],
        logger=loggers or False,
        default_root_dir=str(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
    )


def time_limit(plain: dict[str, Any]) -> TimeLimit | None:
    """The callback of `trainer.max_time`, which comes before all others; None without one."""
    limit, horizon = plain["trainer"].get("max_time"), plain["schedule"].get("horizon", "steps")
    return TimeLimit(limit, horizon) if limit else None


def clean_up(loggers: list[Any]) -> None:
    """Leave nothing of this run behind for the next job of a sweep, which shares the process.

    Only log what goes wrong: the run's own exception must propagate.
    """
    close_loggers(loggers)
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
