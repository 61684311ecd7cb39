"""What a sweep shows while it runs."""

import io

from rich.console import Console

from nanochat import run_lock
from nanochat.reports.live import LiveTable, name_job
from nanochat.run_folder import read_last_row
from tests.reports.folders import write_run


def drawn(table: LiveTable) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    console.print(table.render())
    return console.file.getvalue().splitlines()


def test_a_line_for_each_job(tmp_path):
    write_run(tmp_path / "0", 1.25)
    write_run(tmp_path / "1", 2.0, status="failed")
    running = write_run(tmp_path / "2", 1.5)
    (running / "summary.json").unlink()
    (running / "metrics.csv").open("a").write("41,3.5,1000,800,,\n42,3.")
    lines = drawn(LiveTable(tmp_path, ["optim=[a]", "b", "c", "d"]))
    assert lines[0].strip() == "4 jobs: 1 running, 1 failed, 1 finished, 1 waiting"
    assert [line.split("\u2502")[2].strip() for line in lines if line.startswith("\u2502")] == [
        "optim=[a]",
        "b",
        "c",
        "d",
    ]
    assert "1.2500" in lines[4]
    assert "41" in lines[6]
    assert "3.5000" in lines[6]


def test_a_job_that_goes_on_is_running(tmp_path):
    """What its summary says is how an earlier start ended."""
    folder = write_run(tmp_path / "0", 2.0, status="stopped")
    write_run(tmp_path / "1", 2.0, status="pruned")
    table = LiveTable(tmp_path, ["a", "b"])
    assert drawn(table)[0].strip() == "2 jobs: 1 stopped, 1 pruned"
    with run_lock.hold(folder):
        assert drawn(table)[0].strip() == "2 jobs: 1 running, 1 pruned"


def test_jobs_whose_overrides_come_up_later(tmp_path):
    """Those of a search."""
    write_run(tmp_path / "0", 1.25)
    table = LiveTable(tmp_path, [], Console(file=io.StringIO(), width=100))
    name_job(0, "before it is shown")
    table.start()
    name_job(0, "optim.lr=0.01")
    name_job(2, "optim.lr=0.03")
    table.stop()
    name_job(1, "after")
    lines = drawn(table)
    assert lines[0].strip() == "3 jobs: 1 finished, 2 waiting"
    assert [line.split("\u2502")[2].strip() for line in lines if line.startswith("\u2502")] == [
        "optim.lr=0.01",
        "",
        "optim.lr=0.03",
    ]


def test_a_small_terminal_keeps_what_runs(tmp_path):
    (tmp_path / "7").mkdir()
    table = LiveTable(tmp_path, [str(i) for i in range(20)], Console(file=io.StringIO(), width=80, height=10))
    lines = [line for line in drawn(table) if line.startswith("\u2502")]
    assert len(lines) == 4
    assert any("running" in line for line in lines)


def test_the_last_whole_row(tmp_path):
    path = tmp_path / "metrics.csv"
    assert read_last_row(path) == {}
    path.write_text("step,train/loss\n")
    assert read_last_row(path) == {}
    path.write_text("step,train/loss\n" + "".join(f"{i},{i / 3}\n" for i in range(5000)) + "5000,0.")
    assert read_last_row(path) == {"step": "4999", "train/loss": str(4999 / 3)}
