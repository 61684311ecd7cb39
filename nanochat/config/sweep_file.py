"""What a sweep's folder says of its command line (multirun.yaml, which Hydra writes)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nanochat.errors import UserError

FILE = "multirun.yaml"


@dataclass(frozen=True)
class SavedSweep:
    """What a sweep was started with.

    Args:
        task: overrides of its jobs, as typed. hydra: overrides of Hydra itself.
        cwd: the folder that relative paths are seen from; None where it is gone.
    """

    task: list[str]
    hydra: list[str]
    cwd: Path | None


def read_sweep(folder: Path) -> SavedSweep | None:
    """The command line of the sweep in a folder; None where there is no sweep.

    Raises:
        UserError: its multirun.yaml is not one that a sweep leaves.
    """
    path = folder / FILE
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        overrides: dict[str, Any] = found["hydra"]["overrides"]
        cwd = Path(str(found["hydra"]["runtime"]["cwd"]))
        task, hydra = ([str(word) for word in overrides[kind]] for kind in ("task", "hydra"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as what a sweep leaves.") from error
    return SavedSweep(task, hydra, cwd if cwd.is_dir() else None)
