"""The command that a run was started with, kept in its folder: a later `--resume` does not repeat it."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from nanochat.config.overrides import RESUME
from nanochat.config.schema import in_sweep, key_of, places_of_user, sweep_folder
from nanochat.config.sweep_file import read_sweep
from nanochat.files import atomic_write, shown
from nanochat.run_folder import read_mapping

FILE = "command.json"


def keep_command(folder: Path) -> None:
    """Write the command line into the run's folder; a `--resume` leaves what is there. Raises `OSError`."""
    if not _is_resume():
        with atomic_write(folder / FILE) as file:
            file.write((json.dumps({"overrides": overrides(), "command": command(folder)}, indent=1) + "\n").encode())


def origin(folder: Path) -> dict[str, Any]:
    """What summary.json says of the command line.

    Returns:
        `overrides`: those of the start and of this session; `command`: that of the start; of a session that
        `--resume` began, `resumed_by`: its command.
    """
    own = {"overrides": overrides(), "command": command(folder)}
    if not _is_resume():
        return own
    first = read_mapping(folder / FILE)
    if not isinstance(first.get("overrides"), list) or not isinstance(first.get("command"), str):
        return own  # a run of an earlier version
    changed = {key_of(word) for word in own["overrides"]}
    kept = [word for word in first["overrides"] if key_of(str(word)) not in changed]
    words = [word for word in own["overrides"] if key_of(word) != "ckpt_path"]
    return {"overrides": [*kept, *words], "command": first["command"], "resumed_by": own["command"]}


def overrides() -> list[str]:
    """The command line's overrides; empty when Hydra did not start the run."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def command(folder: Path) -> str:
    """The command line as one would type it again, from the same working folder."""
    if not HydraConfig.initialized():
        return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    if _is_resume():
        words = [word for word in overrides() if key_of(word) != "ckpt_path"]
        return " ".join([shlex.join(["nanochat", "train", "--resume", shown(folder), *words]), *places_of_user()])
    program = ["python", "train.py"] if Path(sys.argv[0]).name == "train.py" else ["nanochat", "train"]
    sweep = read_sweep(sweep_folder(HydraConfig.get())) if in_sweep() else None
    if sweep is None:
        return shlex.join([*program, *sys.argv[1:]])
    # a launcher may have started this process with a command line of its own
    settings = [word for word in sweep.hydra if key_of(word) not in ("hydra.mode", "hydra.searchpath")]
    return " ".join([shlex.join([*program, "-m", *sweep.task, *settings]), *places_of_user()])


def _is_resume() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().job.config_name == RESUME
