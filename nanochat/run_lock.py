"""One process per run folder: a lock that says who holds it.

The lock is a POSIX record lock on `run.lock` in the folder. The system drops it with the process, however that ends, so
that nothing of a dead process has to be recognised; it also works between machines on network file systems that have
such locks (NFS with lockd, NFSv4, Lustre with -o flock). Where there are none, a warning says so.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat.errors import InUseError, UserError

log = logging.getLogger(__name__)

NAME = "run.lock"
PATIENCE = 0.5  # seconds; a reader holds the lock for a moment, too

_held: dict[str, dict[str, Any]] = {}
"""folder -> owner, of this process: opening and closing the file here would drop the lock"""


@contextlib.contextmanager
def hold(folder: Path, try_later: bool = False) -> Iterator[None]:
    """Hold a run's folder, which is made if it is missing, while the block runs.

    Args:
        folder: the run's folder.
        try_later: the error's exit code is then 75 (EX_TEMPFAIL), by which a queue tries again.

    Raises:
        InUseError: another process holds it, or another thread of this one.
        UserError: the folder cannot be written.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _acquire(folder, try_later)
    except OSError as error:
        raise UserError(f"the run folder {folder} cannot be written: {error.strerror or error}.") from error
    path, key = folder / NAME, os.path.realpath(folder)
    owner = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
    }
    _held[key] = owner
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(owner).encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is locked: who opened it meanwhile finds that it is not the file of that name
        os.close(handle)
        del _held[key]
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # nothing was written


def owner(folder: Path) -> dict[str, Any] | None:
    """Who holds a folder: `process`, `host` and `since`, each missing where it cannot be read; None: nobody."""
    held = _held.get(os.path.realpath(folder))
    if held is not None:
        return held
    try:
        handle = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except (BlockingIOError, PermissionError):
        return _read(handle)
    except OSError:  # no locks here
        return None
    finally:
        os.close(handle)


def check_free(folder: Path, try_later: bool = False) -> None:
    """Raise `InUseError` when a process holds the folder."""
    found = owner(folder)
    if found is not None:
        raise _in_use(folder, found, try_later)


def _acquire(folder: Path, try_later: bool) -> int:
    if os.path.realpath(folder) in _held:
        check_free(folder, try_later)
    path, deadline = folder / NAME, time.monotonic() + PATIENCE
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            found = _read(handle)
            os.close(handle)
            if time.monotonic() > deadline:
                raise _in_use(folder, found, try_later) from error
            time.sleep(0.05)
            continue
        except OSError as error:
            log.warning(
                "%s cannot be locked (%s): nothing keeps a second process from training in it.",
                folder,
                error.strerror or error,
            )
            return handle
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # its holder has removed it in between


def _read(handle: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(handle, 4096, 0))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _in_use(folder: Path, found: dict[str, Any], try_later: bool) -> InUseError:
    who = f"process {found.get('process', '?')} on {found.get('host', '?')} since {found.get('since', '?')}"
    error = InUseError(f"{folder} is in use by {who}; wait for it to end, or give another hydra.run.dir.")
    if try_later:
        error.exit_code = os.EX_TEMPFAIL
    return error
