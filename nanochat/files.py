"""Files of a run: either the old one or the new one, never half of it."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file beside `path` for bytes; on leaving it is synced and renamed, on an exception removed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, survives a power cut
    finally:
        os.close(folder)


def quoted(path: Path) -> str:
    """A path as a value of Hydra's grammar, whatever characters it has."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"


def anchored(path: str) -> str:
    """A file, folder or glob as it is called from every working folder; what begins with a `~` is so already."""
    if not path or os.path.isabs(os.path.expanduser(path)):
        return path
    here = os.getcwd()
    if glob.has_magic(path) and not os.path.lexists(path):
        here = glob.escape(here)
    return os.path.join(here, path)


def shown(folder: Path) -> str:
    """A path as one would type it here: relative where that is shorter."""
    return min(str(folder.absolute()), os.path.relpath(folder), key=len)
