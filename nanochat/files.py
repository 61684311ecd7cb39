"""Replacing files and folders whole (the old one or the new one, never half of it), and paths as users write them."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from nanochat.errors import UserError

PLAIN_PATH = re.compile(r"(?!(null|true|false|nan|inf)$)/?[a-z_][\w.-]*(/[\w.-]+)*", re.ASCII | re.IGNORECASE)
"""what Hydra's grammar takes for a text without quotes"""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A free path beside `path`, for a new file or folder that takes its place.

    On leaving the block it is synced and renamed to `path`; what was there before, a folder too, stays until then. On
    an exception it is removed, and `path` is untouched.

    Raises:
        OSError: the place cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _remove(aside)
        yield aside
        for written in [*aside.rglob("*"), aside] if aside.is_dir() else [aside]:
            _sync(written)
        _take_place(aside, path)
    finally:
        with contextlib.suppress(OSError):
            _remove(aside)
    _sync(path.parent)  # the new name, too, survives a power cut


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for bytes that replaces `path` on leaving the block; on an exception `path` is untouched."""
    with replacing(path) as aside, aside.open("wb") as file:
        yield file


def write_text(path: Path, text: str, option: str) -> None:
    """Write a file that the user has named; `option` names another.

    Raises:
        UserError: it cannot be written; what was there is untouched.
    """
    try:
        with atomic_write(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; choose another with {option}."
        ) from error


def _take_place(aside: Path, path: Path) -> None:
    if not aside.is_dir() or not os.path.lexists(path):
        os.replace(aside, path)
        return
    old = aside.with_suffix(".old")  # a folder cannot be renamed over what is there
    _remove(old)
    os.rename(path, old)
    try:
        os.rename(aside, path)
    except OSError:
        os.rename(old, path)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def quoted(path: Path) -> str:
    """A path as a value of Hydra's grammar, whatever characters it has; in quotes where it needs them."""
    if PLAIN_PATH.fullmatch(str(path)):
        return str(path)
    # a backslash is itself, but before a quote
    text = re.sub(r"(\\+)(?='|$)", lambda found: 2 * found[1], str(path))
    return "'" + text.replace("'", "\\'") + "'"


def anchored(path: str) -> str:
    """Make a path or glob absolute; leave one that begins with `~`."""
    if not path or os.path.isabs(os.path.expanduser(path)):
        return path
    here = os.getcwd()
    if glob.has_magic(path) and not os.path.lexists(path):
        here = glob.escape(here)
    return os.path.join(here, path)


def shown(folder: Path) -> str:
    """A path as one would type it here: relative where that is shorter."""
    return min(str(folder.absolute()), os.path.relpath(folder), key=len)
