"""From the command line to `run.train`: Hydra's entry, its errors in words, sweeps, and `--resume`."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from nanochat import run_lock
from nanochat.compat import job_error
from nanochat.config.check import Checked, check
from nanochat.config.compose import check_overrides, hydra_settings
from nanochat.config.hydra_errors import explain
from nanochat.config.overrides import COMPOSING, RESUME, Overrides
from nanochat.config.saved import SavedConfig
from nanochat.config.saved_sweep import resumed
from nanochat.config.schema import CONF, NOTHING_TO_MINIMISE, sweep_folder, sweeper_minimises, user_overrides
from nanochat.config.sweep_file import read_sweep
from nanochat.environment import COMMAND, ranks_started
from nanochat.errors import UserError, did_you_mean, print_error
from nanochat.files import quoted, shown
from nanochat.reports import sweep
from nanochat.reports.live import LiveTable

log = logging.getLogger(__name__)

LEAVINGS = {
    ".hydra",
    "train.log",
    "config.yaml",
    "command.json",
    "model.json",
    "tokenizer.json",
    "multirun.yaml",
    "summary.json",
    "wandb",
    "wandb.json",
    "tensorboard",
    "mlruns",
}
"""what a run or sweep that never got as far as training may have written"""


@dataclass
class _Launch:
    """What the hooks have seen of this launch."""

    started: bool = False
    made: list[Path] = field(default_factory=list)
    """folders that did not exist before, the run's own first"""
    checked: Checked | None = None
    """the configuration of a single run"""
    sweep_folder: Path | None = None
    search: bool = False
    """whether the sweep's jobs are a search's, which has those of earlier starts, too"""
    jobs: list[sweep.Job] = field(default_factory=list)


_launch = _Launch()  # global, since it is Hydra that makes the hooks, from the name of their class
_tables: list[LiveTable] = []
"""what a sweep shows on a terminal; apart from `_launch`, which goes with the task to other processes"""


class Hooks(Callback):
    """Checks a single run before its folder exists, and keeps the record of a sweep.

    Hydra swallows ordinary exceptions of a callback and goes on; only SystemExit stops it.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            with hydra_settings(config) as cfg:
                folder = Path(HydraConfig.get().runtime.output_dir)
                _launch.made = [path for path in (folder, *folder.parents) if not path.exists()]
                if cfg.ckpt_path == "auto" and "${now:" in str(config.hydra.run._get_node("dir")._value()):
                    raise UserError("ckpt_path=auto needs a folder that stays the same; give hydra.run.dir.")
                _launch.checked = check(cfg)
                _check_folder(folder)
                run_lock.check_free(folder, try_later=cfg.ckpt_path == "auto")
        except UserError as error:
            print_error(error)
            raise SystemExit(error.exit_code) from error
        except Exception as error:
            traceback.print_exc()
            raise SystemExit(1) from error

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            with hydra_settings(config):
                folder = Path(HydraConfig.get().sweep.dir).absolute()
                _check_sweep(folder, user_overrides())
                run_lock.check_free(folder)  # a search holds its folder
                _launch.made = [path for path in (folder, *folder.parents) if not path.exists()]
                _launch.sweep_folder = folder
                _launch.search = sweeper_minimises()
                jobs = [] if _launch.search else sweep.planned(user_overrides())
        except UserError as error:
            print_error(error)
            raise SystemExit(error.exit_code) from error
        if not _launch.search:
            sweep.forget(folder)
        if sys.stderr.isatty():
            os.environ[sweep.QUIET] = "1"  # for jobs in processes of their own, too
            _tables.append(LiveTable(folder, jobs))
            _tables[-1].start()

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        _launch.started = True

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        assert job_return.hydra_cfg is not None
        settings = job_return.hydra_cfg.hydra
        if settings.mode != RunMode.MULTIRUN:
            return
        failed = job_return.status is JobStatus.FAILED
        error = job_error(job_return) if failed else None
        job = sweep.Job(
            int(settings.job.num), list(job_return.overrides or []), Path(settings.runtime.output_dir), error
        )
        if _launch.sweep_folder is None:  # a launcher has started this job in a process of its own
            job.record(sweep_folder(settings))
        elif _launch.search:
            job.record(_launch.sweep_folder)
        else:
            _launch.jobs.append(job)
        if error is not None and not isinstance(error, UserError):
            traceback.print_exception(error)


def _check_sweep(folder: Path, overrides: list[str]) -> None:
    """Raise `UserError` when a folder holds another sweep: its jobs would be taken for those of this one."""
    saved = read_sweep(folder)
    if saved is not None and saved.task != overrides:
        raise UserError(
            f"{shown(folder)} holds another sweep ({' '.join(saved.task)}); choose another hydra.sweep.dir."
        )


def _check_folder(folder: Path) -> None:
    """Raise `UserError` when the run's folder cannot be written."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not place.is_dir():
        raise UserError(f"hydra.run.dir={folder} is not a folder: {place} is a file.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"hydra.run.dir={folder} cannot be written: {place} is read-only; choose another folder.")


def _discard(folder: Path) -> None:
    """Remove the folder of a run (or sweep) that never began, and the empty folders made for it."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= LEAVINGS:
        shutil.rmtree(folder, ignore_errors=True)
        for path in _launch.made[1:] if _launch.made[:1] == [folder] else ():
            try:
                path.rmdir()
            except OSError:
                return


def _quieten_lightning() -> None:
    """Only what matters of what Lightning prints: it has handlers of its own, made when it is imported."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.")  # about its own use of torch


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def _task(cfg: DictConfig) -> float | None:
    """One run; its value is what a sweeper minimises."""
    from nanochat.run import train

    _quieten_lightning()
    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    if settings.mode == RunMode.MULTIRUN:
        if (done := sweep.finished(folder)) is not None:
            log.info("%s is %s already.", shown(folder), done["status"])
            return done.get("val/bpb")
        if (folder / "checkpoints").is_dir():
            cfg.ckpt_path = "auto"
    try:
        with sweep.quiet():
            value = train(_launch.checked or cfg, folder).get("val/bpb")
        if value is None and sweeper_minimises():
            raise UserError(f"{NOTHING_TO_MINIMISE}: its validation counted no bytes of text.")
        return value
    except UserError as error:
        if settings.mode == RunMode.MULTIRUN:
            _discard(folder)
            raise  # SystemExit would end the other jobs too
        if folder in _launch.made:
            _discard(folder)
        print_error(error)
        raise SystemExit(error.exit_code) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Train what the command line says; `train.py` and `nanochat train`.

    Returns:
        0 done; 2 the user's mistake, in one sentence on stderr; 75 another process trains in the folder, under
        ckpt_path=auto; 1 anything else, a run that diverged too; 130 interrupted. In a sweep every job has its turn,
        and the code is 2 when all failures were the user's mistakes.

    Raises:
        SystemExit: with the same meaning, from inside of a run (143 after SIGTERM).
    """
    global _launch
    _launch = _Launch()
    if ranks_started() > 1:
        given = os.environ[COMMAND] = repr(list(sys.argv[1:] if argv is None else argv))
        if os.environ["RANK"] != "0":
            from nanochat.rank import follow

            return follow()
        if "'-m'" in given or "'--multirun'" in given:
            print_error("a sweep starts the ranks of each job itself (trainer.devices=N); run it without torchrun.")
            return 2
    before, full, here = sys.argv, os.environ.get("HYDRA_FULL_ERROR"), os.getcwd()
    try:
        words, check_saved = resume(list(sys.argv[1:] if argv is None else argv))
        flags, overrides = split(words)
        check_saved()
        sys.argv = [before[0], *flags, *overrides]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands us its errors instead of printing them
        try:
            _task()
        finally:
            if _launch.sweep_folder is not None and not _launch.jobs:
                _launch.jobs = sweep.collect(_launch.sweep_folder)
    except UserError as error:
        if not is_reported(error):
            print_error(error)
            return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left, as in `train.py --cfg job | head`
        sys.stderr.close()
        return 0
    except COMPOSING as error:
        if _launch.started or full == "1":
            raise_unless_reported(error)
        else:
            print_error(explain(error))
            return 2
    except Exception as error:
        raise_unless_reported(error)
    finally:
        while _tables:
            _tables.pop().stop()
            os.environ.pop(sweep.QUIET, None)
        sys.argv = before
        os.chdir(here)
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full
        if _launch.sweep_folder in _launch.made and not _launch.jobs:
            _discard(_launch.sweep_folder)
        elif _launch.sweep_folder is not None:
            sweep.report(_launch.jobs, _launch.sweep_folder)
    return sweep.exit_code(_launch.jobs)


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Flags and overrides of a command line, wherever the flags stand; Hydra's parser wants them together.

    Raises:
        UserError: a flag that is not Hydra's, or overrides with problems.
    """
    parser = get_args_parser()

    def refuse(message: str) -> None:
        known = [flag for action in parser._actions for flag in action.option_strings]
        wrong = next((w for w in words if w.startswith("-") and w.partition("=")[0] not in known), "")
        raise UserError(f"{wrong} is not a flag{did_you_mean(wrong, known)}" if wrong else f"{message}.")

    parser.error = refuse  # type: ignore[method-assign, assignment]
    options = parser.parse_intermixed_args(words)
    left, flags = list(options.overrides), []
    for word in words:
        if left and word == left[0]:
            left.pop(0)
        else:
            flags.append(word)
    if not (options.help or options.hydra_help or options.config_path or options.shell_completion):
        name = options.config_name or "train"
        check_overrides(Overrides(options.overrides, name, options.config_dir, options.multirun))
    return flags, options.overrides


def is_reported(error: Exception) -> bool:
    """Whether an error is that of a sweep's job, which is in the table."""
    return any(job.error is error or str(job.error) == sweep.sentence(error) for job in _launch.jobs)


def raise_unless_reported(error: Exception) -> None:
    """Raise an error again, unless it is in the table."""
    if not is_reported(error):
        raise error


def resume(words: list[str]) -> tuple[list[str], Callable[[], None]]:
    """Turn `--resume RUN` into the arguments for Hydra that continue RUN with its own configuration.

    The saved config.yaml (every value resolved) takes the place of the groups, so that neither later changes of
    conf/ nor the machine's `auto` change the run; further overrides of its values work. Of a sweep, the command line
    is run again in its folder: jobs that are finished are skipped, others go on from their checkpoints.

    Returns:
        the arguments, and a check that imports what the saved configuration names, for when they are known to be right.

    Raises:
        UserError: RUN is missing, is not a run folder, or names what only `--trust` allows.
    """
    rest, trusted = [word for word in words if word != "--trust"], "--trust" in words
    place = next((i for i, word in enumerate(rest) if word.partition("=")[0] == "--resume"), None)
    if place is None:
        if trusted:
            raise UserError("--trust believes what a run folder's config.yaml says; it goes with --resume RUN.")
        return words, lambda: None
    _, equals, name = rest[place].partition("=")
    if not equals and len(rest) == place + 1:
        raise UserError("--resume needs the run folder, such as --resume outputs/latest.")
    name = name if equals else rest[place + 1]
    rest = rest[:place] + rest[place + (1 if equals else 2) :]
    if {"-m", "--multirun"} & set(rest):
        raise UserError("--resume takes what is to be trained from the folder; it does not go with --multirun.")
    folder = Path(name).resolve()
    if not folder.is_dir():
        raise UserError(f"--resume {name}: there is no such run folder.")
    if not (folder / "config.yaml").exists() and (saved_sweep := read_sweep(folder)) is not None:
        words = resumed(folder, name, saved_sweep, rest, trusted)
        os.chdir(saved_sweep.cwd or Path.cwd())  # relative paths are seen from there
        return words, lambda: None
    config = SavedConfig(folder, name, rest, trusted)
    saved = config.read()
    ConfigStore.instance().store(name="saved_run", node=saved, package="_global_")
    words = ["--config-name", RESUME, f"hydra.run.dir={quoted(folder)}", "ckpt_path=last", *rest]
    return words, lambda: config.check_types(saved)
