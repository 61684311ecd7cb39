"""How ranks are started, watched and ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat.config.check import check
from nanochat.config.schema import CONF
from nanochat.errors import ConfigError, UserError
from nanochat.ranks import TIMEOUT, timeout_of
from nanochat.training import launcher
from nanochat.training.failures import in_words
from nanochat.training.launcher import RankDiedError, RankFailedError
from tests.ranks.pools import Pool, Train, close, job_of, train_on
from tests.ranks.test_agreement import WIDE
from tests.runs import configure, read_state, words

# ---- the end of a job ------------------------------------------------------------------------------------------------


def ended(place: Path, *programs: str, patience: float = 60.0) -> None:
    """Watch some programs in the place of ranks to their end."""
    processes = [subprocess.Popen([sys.executable, "-c", program], cwd=place) for program in programs]
    try:
        codes = launcher._wait(processes, place, patience)
        launcher._raise_for(codes, place, [], [i for i in range(len(programs)) if i not in codes])
    finally:
        for process in processes:
            process.kill()
            process.wait()


SLEEP, KILLED = "import time; time.sleep(60)", "import os; os.kill(os.getpid(), 9)"
LOST = "import sys; sys.exit(75)"


def test_the_cause_is_told_and_not_its_consequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "GRACE", 1.0)
    began = time.monotonic()
    with pytest.raises(RankDiedError, match=r"rank 1 was killed by SIGKILL.*ckpt_path=auto") as error:
        ended(tmp_path, LOST, KILLED, SLEEP)
    assert error.value.exit_code == 75
    assert time.monotonic() - began < 30
    with pytest.raises(RankFailedError, match="rank 1 of 2 failed") as failure:
        ended(tmp_path, LOST, "raise SystemExit(1)")
    assert failure.value.exit_code == 1
    with pytest.raises(RankDiedError, match="lost its connection"):
        ended(tmp_path, LOST, LOST)
    (tmp_path / "error-0.json").write_text(json.dumps({"text": "the disk is full."}))
    with pytest.raises(UserError, match=r"^the disk is full\.$"):
        ended(tmp_path, "raise SystemExit(2)", LOST)
    (tmp_path / launcher.LEFT).touch()
    with pytest.raises(SystemExit) as end:
        ended(tmp_path, "raise SystemExit(143)", "raise SystemExit(143)")
    assert end.value.code == 143
    ended(tmp_path, "", "")
    for codes in ({0: 2, 1: 143}, {1: 143, 0: 2}, {1: 75, 0: 2}):  # a signal came while a rank failed
        with pytest.raises(UserError, match=r"^the disk is full\.$") as refused:
            launcher._raise_for(codes, tmp_path, [])
        assert refused.value.exit_code == 2
    with pytest.raises(RankFailedError, match="rank 1 of 2 failed"):
        launcher._raise_for({0: 143, 1: 1}, tmp_path, [])


def test_a_rank_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "GRACE", 0.5)
    with pytest.raises(RankDiedError, match=r"^rank 1 hangs: the others have ended, and it did not\. .*auto") as error:
        ended(tmp_path, "", SLEEP, patience=0.5)
    assert error.value.exit_code == 75
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    late = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation")
    silent = in_words(late, {"rank_timeout": "5s"}, 7, "last.ckpt")
    monkeypatch.setenv("RANK", "2")
    assert silent is not None
    assert launcher.exit_code_of(silent, tmp_path) == 75
    monkeypatch.setenv("RANK", "0")  # another one notices that this one has left
    lost = in_words(RuntimeError("gloo: Connection closed by peer"), {}, 7, None)
    assert lost is not None
    assert launcher.exit_code_of(lost, tmp_path) == 75
    sentence = r"^rank 1 hangs: ranks have waited for 5s \(rank_timeout\) for one that is silent, after step 7; resume"
    with pytest.raises(UserError, match=sentence) as waited:
        ended(tmp_path, LOST, SLEEP, LOST)
    assert waited.value.exit_code == 75


def test_our_own_ranks_meet_in_a_file_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    timeout = timeout_of({"rank_timeout": "90s"})
    one, other = launcher.store_at(tmp_path, timeout), launcher.store_at(tmp_path, timeout)
    one.set("word", "here")
    assert other.get("word") == b"here"
    assert other.timeout.total_seconds() == 90  # type: ignore[attr-defined]
    assert timeout_of({}) == TIMEOUT
    assert (tmp_path / launcher.STORE).is_file()


# ---- what is refused -------------------------------------------------------------------------------------------------


def differ(job: launcher.Job) -> list[Train]:
    """The jobs of two ranks, the second with another seed."""
    return [Train(job), Train(launcher.Job({**job.plain, "seed": 7}, job.folder, None, ["test"]))]


def test_ranks_that_are_not_alike_are_refused(place: Path, two: Pool) -> None:
    job = job_of(place, place / "unlike", [*WIDE, "data.batch_size=2", "trainer.devices=2"])
    with pytest.raises(AssertionError, match=r"UserError: .*the configuration of rank 1 differs from rank 0's"):
        two.call(*differ(job))
    assert not (place / "unlike" / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("overrides", "environment", "problem"),
    [
        (["trainer.devices=0"], {}, "trainer.devices=0 must be the number of ranks"),
        (["trainer.devices=[0,0]"], {}, "different GPUs"),
        (["trainer.devices=[0,1]"], {}, "a CPU has no numbers"),
        (["trainer.num_nodes=2"], {}, "needs torchrun on each of the machines"),
        (["+trainer.strategy=fsdp"], {}, "trainer.strategy=fsdp is unknown"),
        (["trainer.devices=3"], {"WORLD_SIZE": "2"}, "2 ranks were started, but trainer.devices=3"),
        ([], {"WORLD_SIZE": "2"}, "2 ranks were started, but trainer.devices=1"),
    ],
)
def test_ranks_that_cannot_be(
    place: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], environment: dict[str, str], problem: str
) -> None:
    if environment:
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "0")
        monkeypatch.setenv("WORLD_SIZE", environment["WORLD_SIZE"])
    with pytest.raises(ConfigError) as error:
        check(configure(place, overrides))
    assert problem in str(error.value)
    assert len(error.value.problems) == 1


def test_more_gpus_than_there_are(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"^trainer\.devices=3: this machine has 2 cuda devices\.$"):
        check(configure(place, ["trainer.accelerator=cuda", "trainer.devices=3"]))


def test_rows_that_do_not_divide_are_refused_at_a_resume(place: Path, two: Pool) -> None:
    train_on(two, place, place / "divide", [*WIDE, "trainer.max_steps=2"])
    with pytest.raises(UserError, match=r"data\.batch_size x ranks 4 -> 3\. "):
        job_of(place, place / "divide", [*WIDE, "ckpt_path=last", "data.batch_size=1", "trainer.devices=3"])
    with pytest.raises(UserError, match=r"data\.batch_size x ranks 4 -> 2 \(data\.batch_size=4 keeps it\)\."):
        job_of(place, place / "divide", [*WIDE, "ckpt_path=last", "data.batch_size=2", "trainer.devices=1"])


# ---- real processes --------------------------------------------------------------------------------------------------


def command(place: Path, folder: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "nanochat.cli", "train", *words(place), *WIDE, "data.batch_size=2", "trainer.devices=2",
        f"hydra.run.dir={folder}", *more,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONF.parent)}


def wait_for(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(number) for number in found]


def lose_a_rank(place: Path, folder: Path, steps: int, *more: str) -> None:
    """A rank of a run is killed: the command ends in time and says so, and the next start gives the unkilled run."""
    more = (*more, "callbacks.checkpoint.every_n_train_steps=1", f"trainer.max_steps={steps}")
    process = subprocess.Popen(command(place, folder, *more), env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for((folder / "checkpoints" / "last.ckpt").exists)
    ranks = children(process.pid)
    assert len(ranks) == 2
    began = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert process.returncode == 75
    assert "error: rank 1 was killed by SIGKILL" in errors
    assert "Traceback" not in errors
    assert all(not Path(f"/proc/{rank}").exists() for rank in ranks)
    step = read_state(folder)["global_step"]
    done = subprocess.run(command(place, folder, *more, "ckpt_path=auto"), env=environment(), timeout=200)
    assert done.returncode == 0
    assert step < read_state(folder)["global_step"] == steps
    unkilled = folder.with_name(f"{folder.name}-unkilled")
    train_on(None, place, unkilled, [*WIDE, f"trainer.max_steps={steps}"])
    close(unkilled, folder)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux' /proc")
def test_a_killed_rank_ends_the_job_and_the_next_start_goes_on(place: Path) -> None:
    lose_a_rank(place, place / "killed", 60)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_to_the_command(place: Path, number: int, code: int) -> None:
    folder = place / f"command-{number}"
    process = subprocess.Popen(command(place, folder, "trainer.max_steps=100000"), env=environment())
    wait_for(lambda: (folder / "metrics.csv").exists() and len((folder / "metrics.csv").read_text().splitlines()) > 2)
    ranks = children(process.pid)
    process.send_signal(number)
    assert process.wait(60) == code
    wait_for(lambda: all(not Path(f"/proc/{rank}").exists() for rank in ranks), 60)
    if number == signal.SIGTERM:
        assert read_state(folder)["global_step"] > 0
        assert json.loads((folder / "summary.json").read_text())["status"] == "stopped"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_a_rank_that_sleeps_ends_the_job_in_time(place: Path, strategy: str) -> None:
    folder = place / f"asleep-{strategy}"
    more = [f"+trainer.strategy={strategy}", "trainer.max_steps=100000", "rank_timeout=15s",
            "callbacks.checkpoint.every_n_train_steps=1"]  # fmt: skip
    process = subprocess.Popen(command(place, folder, *more), env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for((folder / "checkpoints" / "last.ckpt").exists)
    ranks = children(process.pid)
    os.kill(ranks[1], signal.SIGSTOP)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 75
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: rank 1 hangs: ranks have waited for 15s (rank_timeout)")
    assert last.endswith("last.ckpt with ckpt_path=auto.")
    assert all(not Path(f"/proc/{rank}").exists() for rank in ranks)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_torchrun(place: Path, strategy: str) -> None:
    folder = place / f"torchrun-{strategy}"
    run = command(place, folder, f"+trainer.strategy={strategy}")[2:]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", *run]
    done = subprocess.run(launch, env=environment(), timeout=200)
    assert done.returncode == 0
    train_on(None, place, place / f"no-torchrun-{strategy}", WIDE)
    close(place / f"no-torchrun-{strategy}", folder)
