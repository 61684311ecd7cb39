"""One process per run folder, whatever becomes of the others."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat import run_lock
from nanochat.config.schema import CONF
from nanochat.errors import InUseError, UserError

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONF.parent)}
HOLD = """
import sys, time
from pathlib import Path
from nanochat import run_lock
with run_lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def start_holder(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds tmp_path / "run"."""
    process = start_holder(tmp_path / "run")
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    folder = tmp_path / "run"
    sentence = rf"^{folder} is in use by process {other.pid} on {socket.gethostname()} since 20\d\d-[^;]*; wait for it"
    for action in (lambda: run_lock.check_free(folder), lambda: run_lock.hold(folder).__enter__()):
        with pytest.raises(InUseError, match=sentence) as caught:
            action()
        assert caught.value.exit_code == 2
    with pytest.raises(InUseError) as caught, run_lock.hold(folder, try_later=True):
        pass
    assert caught.value.exit_code == 75
    other.communicate("\n")
    with run_lock.hold(folder):
        assert (run_lock.holder(folder) or {})["process"] == os.getpid()
    assert run_lock.holder(folder) is None


def test_a_killed_process_is_taken_over(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.kill()
    other.wait()
    assert (tmp_path / "run" / run_lock.NAME).exists()
    assert run_lock.holder(tmp_path / "run") is None
    with run_lock.hold(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / run_lock.NAME).read_text())["process"] == os.getpid()


def test_nothing_is_left_of_a_lock(tmp_path: Path) -> None:
    with run_lock.hold(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(ZeroDivisionError), run_lock.hold(tmp_path / "old"):
        raise ZeroDivisionError
    assert list((tmp_path / "old").iterdir()) == []


def test_one_process_holds_a_folder_once(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("run")
    with run_lock.hold(tmp_path / "run"):
        with pytest.raises(InUseError, match=f"process {os.getpid()}"), run_lock.hold(tmp_path / "link"):
            pass
        assert run_lock.holder(tmp_path / "link") is not None


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"), run_lock.hold(tmp_path / "file" / "run"):
        pass
    with run_lock.hold(tmp_path / "run"):
        pass


def test_many_at_once_take_turns(tmp_path: Path) -> None:
    """Each holds the folder for a moment, again and again; the file of a lock goes and comes all the time."""
    code = """
import sys, time
from pathlib import Path
from nanochat import run_lock
from nanochat.errors import InUseError
folder, done = Path(sys.argv[1]), 0
run_lock.PATIENCE = 0
while done < 20:
    try:
        with run_lock.hold(folder):
            (folder / "alone").touch(exist_ok=False)
            time.sleep(0.002)
            (folder / "alone").unlink()
        done += 1
    except InUseError:
        time.sleep(0.001)
"""
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    processes = [subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert list((tmp_path / "run").iterdir()) == []


# ---- where the system's locks do not reach ---------------------------------------------------------------------------


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_another_machine_s_free_lock_is_taken_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / run_lock.NAME).write_text(json.dumps({"process": 7, "host": "node-3", "since": "2026-11-23 10:00:00"}))
    with run_lock.hold(tmp_path):
        assert "process 7 on node-3 since 2026-11-23 10:00:00" in caplog.text
        assert "make sure that the process has ended" in caplog.text


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_the_text_decides(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lockf(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_lock, "fcntl", SimpleNamespace(lockf=lockf, LOCK_EX=2, LOCK_SH=1, LOCK_NB=4))
    path, host = tmp_path / run_lock.NAME, socket.gethostname()
    with run_lock.hold(tmp_path):
        assert "has no locks" in caplog.text
    assert not path.exists()
    path.write_text(json.dumps({"process": dead_process(), "host": host, "since": "then"}))
    assert run_lock.holder(tmp_path) is None
    with run_lock.hold(tmp_path):
        pass
    path.write_text(json.dumps({"process": os.getppid(), "host": host, "since": "then"}))
    with pytest.raises(InUseError, match=f"process {os.getppid()} on {host} since then; wait"), run_lock.hold(tmp_path):
        pass
    path.write_text(json.dumps({"process": dead_process(), "host": "node-3", "since": "then"}))
    with pytest.raises(InUseError, match=rf"on node-3 since then.* remove {path}\.$"), run_lock.hold(tmp_path):
        pass
    assert (run_lock.holder(tmp_path) or {})["host"] == "node-3"


def test_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fcntl: byte-range locks, which this stand-in has no others to share with."""
    calls: list[tuple[int, int]] = []
    monkeypatch.setitem(sys.modules, "fcntl", None)
    stand_in = SimpleNamespace(LK_NBLCK=2, locking=lambda handle, mode, count: calls.append((mode, count)))
    monkeypatch.setitem(sys.modules, "msvcrt", stand_in)
    spec = importlib.util.spec_from_file_location("run_lock_on_windows", run_lock.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.hold(tmp_path):
        assert json.loads((tmp_path / run_lock.NAME).read_text())["process"] == os.getpid()
    assert calls == [(2, 1)]
    assert not (tmp_path / run_lock.NAME).exists()
