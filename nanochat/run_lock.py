"""One process per run folder: a lock that says who holds it.

The lock is the operating system's own on `run.lock` in the folder (a POSIX record lock; on Windows a byte-range lock).
The system drops it with the process, however that ends, so a killed run is taken over without a guess. It reaches
other machines on network file systems that pass such locks on (NFSv4, NFSv3 with lockd, Lustre mounted with flock).
Where a file system has none, a warning says so and the file's text decides: a holder on this machine that has ended is
taken over, any other is refused with the sentence that says how to remove the file; two processes that start in the
same millisecond are then not distinguished.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat.errors import InUseError, UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

NAME = "run.lock"
TRY_LATER = 75  # EX_TEMPFAIL, which Windows' os lacks
PATIENCE = 0.5  # seconds; a reader holds the lock for a moment, too
BUSY = {errno.EACCES, errno.EAGAIN}  # errors of a lock that another process holds
LOCKED_BYTE = 1 << 30  # on Windows a locked byte cannot be read, so it lies beyond the text

_held: dict[str, dict[str, Any]] = {}
"""folder -> holder, of this process: opening and closing the file here would drop the lock"""


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
    key = os.path.realpath(folder)
    here = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
    }
    if _held.setdefault(key, here) is not here:
        raise _in_use(folder, _held[key], try_later)
    handle = None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = _acquire(folder, here["host"], try_later)
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, json.dumps(here).encode())
        except OSError as error:
            raise UserError(f"the run folder {folder} cannot be written: {error.strerror or error}.") from error
        yield
    finally:
        if handle is not None:
            _release(folder / NAME, handle)
        del _held[key]
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # nothing was written


def holder(folder: Path) -> dict[str, Any] | None:
    """Who holds a folder: `process`, `host` and `since`, each missing where it cannot be read; None: nobody."""
    held = _held.get(os.path.realpath(folder))
    if held is not None:
        return held
    try:
        handle = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        locked = _lock(handle, shared=True)
        found = _read(handle)
        if locked is None:
            return None if _has_ended(found, socket.gethostname()) else found
        return None if locked else found
    finally:
        os.close(handle)


def check_free(folder: Path, try_later: bool = False) -> None:
    """Raise `InUseError` when a process holds the folder."""
    found = holder(folder)
    if found is not None:
        raise _in_use(folder, found, try_later)


def _acquire(folder: Path, host: str, try_later: bool) -> int:
    path, deadline = folder / NAME, time.monotonic() + PATIENCE
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        locked, found = _lock(handle), _read(handle)
        if locked is False:
            os.close(handle)
            if time.monotonic() > deadline:
                raise _in_use(folder, found, try_later)
            time.sleep(0.05)
            continue
        if locked is None:
            if not _has_ended(found, host):
                os.close(handle)
                raise _in_use(folder, found, try_later)
            log.warning(
                "The file system of %s has no locks: a second process is noticed by the text of %s alone.", folder, NAME
            )
            return handle
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                if found.get("host", host) != host:
                    log.warning(
                        "Taking over %s, whose lock says %s: that lock is free. If the file system keeps its locks to "
                        "each machine (NFS mounted with nolock), make sure that the process has ended.",
                        folder,
                        _who(found),
                    )
                return handle
        os.close(handle)  # its holder has removed it in between


def _lock(handle: int, shared: bool = False) -> bool | None:
    """Whether the file is now locked by this process; None where there are no locks."""
    try:
        if fcntl is not None:
            fcntl.lockf(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        else:
            import msvcrt

            os.lseek(handle, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError as error:
        return False if error.errno in BUSY else None
    return True


def _release(path: Path, handle: int) -> None:
    if fcntl is None:  # Windows removes no file that is open
        os.close(handle)
    with contextlib.suppress(OSError):
        # while it is locked: who opened it meanwhile finds that it is not the file of that name
        if fcntl is None or os.path.samestat(os.fstat(handle), os.stat(path)):
            path.unlink()
    if fcntl is not None:
        os.close(handle)


def _has_ended(found: dict[str, Any], host: str) -> bool:
    """Whether a lock's holder is known to have ended, by the text alone."""
    process = found.get("process")
    if not found:
        return True
    if fcntl is None or found.get("host") != host or not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    return False


def _read(handle: int) -> dict[str, Any]:
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        found = json.loads(os.read(handle, 4096))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _who(found: dict[str, Any]) -> str:
    return f"process {found.get('process', '?')} on {found.get('host', '?')} since {found.get('since', '?')}"


def _in_use(folder: Path, found: dict[str, Any], try_later: bool) -> InUseError:
    text = (
        f"{folder} is in use by {_who(found)}; wait for it to end, or give another folder (hydra.run.dir, "
        "hydra.sweep.dir)."
    )
    if found.get("host") != socket.gethostname():
        text += f" If that machine or process is gone for good, remove {folder / NAME}."
    error = InUseError(text)
    if try_later:
        error.exit_code = TRY_LATER
    return error
