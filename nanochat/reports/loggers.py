"""Lightning's loggers in a run: started before the first step, fed with a tokens axis, closed whatever happens."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from nanochat.config.schema import in_sweep
from nanochat.errors import UserError
from nanochat.reports.wandb_logger import WandbLogger

log = logging.getLogger(__name__)

PLACES = ("save_dir", "dir", "root_dir")
"""arguments of loggers that are folders; relative ones lie in the run's folder"""

EXTRAS = {"MLFlowLogger": "mlflow", "TensorBoardLogger": "tensorboard", "WandbLogger": "wandb"}
"""Lightning's loggers that need one of our extras"""


def build_loggers(plain: dict[str, Any], folder: Path) -> list[Any]:
    """The configured loggers, started, so that a missing account or network is found before the first step.

    Args:
        folder: the run's folder.

    Raises:
        UserError: a logger cannot be used; those before it are closed.
    """
    loggers: list[Any] = []
    for name, node in (plain.get("logger") or {}).items():
        if not node:
            continue
        node = {key: _inside(folder, value) if key in PLACES else value for key, value in node.items()}
        wandb = str(node["_target_"]).endswith(".WandbLogger")
        try:
            if wandb and in_sweep():
                _silence_wandb()
            if str(node["_target_"]).endswith(".MLFlowLogger"):
                # MLflow 3 refuses its store of files without this; the other one needs a database's packages
                os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            logger = instantiate(node)
            loggers.append(logger)
            if isinstance(logger, WandbLogger):
                logger.begin(folder, plain)
            elif hasattr(type(logger), "experiment"):  # Lightning does not ask it of a logger
                _ = logger.experiment
            if hasattr(logger, "log_hyperparams"):
                logger.log_hyperparams({"cfg": plain})
        except Exception as raised:
            close_loggers(loggers)
            error = _unwrapped(raised)
            if isinstance(error, UserError):
                raise error from raised
            if isinstance(error, ModuleNotFoundError):
                extra = EXTRAS.get(str(node["_target_"]).rpartition(".")[2])
                how = f"pip install 'nanochat[{extra}]'" if extra else error.name or _reason(error)
                raise UserError(f"logger={name} needs a package that is not installed: {how}.") from error
            hint = f": logger.{name}.offline=true needs neither an account nor a network" if wandb else ""
            raise UserError(f"logger={name} cannot be used ({_reason(error)}){hint}.") from error
        for method in ("log_metrics", "log_text", "finalize"):
            if hasattr(logger, method):
                setattr(logger, method, _Forgiving(getattr(logger, method), name))
    return loggers


def is_wandb(logger: Any) -> bool:
    """Whether a logger is Lightning's for Weights & Biases."""
    return type(logger).__name__ == "WandbLogger"


def _silence_wandb() -> None:
    """Keep the client's remarks, some ten lines for each job, out of a sweep's output."""
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")  # for the client, which reads it when it starts
    wandb.termsetup(wandb.Settings(silent=True), None)  # until then


class _Forgiving:
    """A logger's method that warns, once, instead of ending the run: metrics.csv has every number too."""

    def __init__(self, method: Callable[..., Any], name: str) -> None:
        self.method, self.name, self.failed = method, name, False

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        try:
            self.method(*args, **kwargs)
        except Exception as error:
            if not self.failed:
                log.warning("logger=%s misses something (%s); the run goes on.", self.name, _reason(error))
            self.failed = True


def log_summary(loggers: list[Any], content: dict[str, Any]) -> None:
    """Hand what summary.json says to W&B's summary.

    Args:
        content: summary.json.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            try:
                logger.log_summary(content)
            except Exception as error:
                log.warning("Weights & Biases misses the summary (%s).", _reason(error))


def close_loggers(loggers: list[Any]) -> None:
    """Finish W&B's runs, since the next job of a sweep shares the process; only logs what goes wrong."""
    for logger in loggers:
        if is_wandb(logger):
            try:
                logger.experiment.finish()
            except Exception as error:
                log.warning("Weights & Biases could not be closed (%s).", _reason(error))


def _inside(folder: Path, place: Any) -> Any:
    return str(folder.absolute() / place) if isinstance(place, str | os.PathLike) else place


def _unwrapped(error: Exception) -> Exception:
    """What Hydra's error was raised from."""
    cause = error.__cause__
    return cause if isinstance(error, InstantiationException) and isinstance(cause, Exception) else error


def _reason(error: Exception) -> str:
    """The kind of an error and its message's first sentence, without a stop."""
    text = " ".join(str(error).split()).partition(". ")[0]
    return f"{type(error).__name__}: {text.rstrip('.')}"
