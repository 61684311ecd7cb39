"""Where the models of the zoo lie on this machine, and the file that `zoo:NAME` means."""

from __future__ import annotations

import os
from pathlib import Path

from nanochat import npm
from nanochat.errors import UserError, did_you_mean
from nanochat.zoo.manifest import MANIFEST, Manifest, check_files, check_name, read_manifest

SCHEME = "zoo:"
RUN_HELP = "run folder (outputs/latest), .ckpt or .gguf file, or zoo:NAME"
"""help of a RUN argument"""
PACKAGED = Path(__file__).parent / "models"
"""models that come with nanochat"""


def user_folder() -> Path:
    """Where models of the user's own are kept: $NANOCHAT_ZOO, else `zoo` in the user's cache."""
    named = os.environ.get("NANOCHAT_ZOO")
    return Path(named).expanduser() if named else npm.cache_folder("zoo")


def folders() -> list[Path]:
    """Where models are looked for, the user's own first."""
    return [user_folder(), PACKAGED]


def names() -> list[str]:
    """Every model on this machine."""
    return sorted({path.parent.name for folder in folders() for path in folder.glob(f"*/{MANIFEST}")})


def find(name: str, hashes: bool = True) -> tuple[Path, Manifest]:
    """A model's folder and manifest, its files compared with their hashes, or else with their sizes alone.

    Raises `UserError` for a name that is not on this machine, and for a folder that is damaged.
    """
    check_name(name)
    for place in folders():
        folder = place / name
        if (folder / MANIFEST).is_file():
            manifest = read_manifest(folder)
            if manifest.name != name:
                raise UserError(f"{folder} holds a model of another name, {manifest.name!r}.")
            check_files(folder, manifest, hashes)
            return folder, manifest
    raise UserError(
        f"there is no model {name!r} in the zoo on this machine{did_you_mean(name, names())} "
        "`nanochat zoo get SOURCE` fetches one."
    )


def located(path: str | Path) -> Path:
    """A path as it is; for `zoo:NAME` the model's GGUF file, checked. Raises `UserError` as `find` does."""
    text = str(path)
    if not text.startswith(SCHEME):
        return Path(path)
    folder, manifest = find(text.removeprefix(SCHEME))
    return folder / manifest.weights
