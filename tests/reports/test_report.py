"""`nanochat report`: what is averaged, what is said beside it, and what is refused."""

from __future__ import annotations

import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import nanochat.cli
from nanochat.errors import UserError
from nanochat.studies import findings
from nanochat.studies.evidence import groups_of, read_runs
from nanochat.studies.places import as_typed, from_here
from nanochat.studies.report import Report
from tests.reports.folders import TEXT, write_run, write_sweep


def groups(*folders: Path, against: str | None = None):
    return groups_of(read_runs(folders), against)


def cells(table, row=-1):
    return dict(zip(table.headings, table.rows[row], strict=True))


def test_means_differences_and_verdict(tmp_path):
    """Against numpy, with Student's quantile of two degrees of freedom."""
    [group] = groups(write_sweep(tmp_path / "sweep"))
    assert [arm.name for arm in group.arms] == ["optim=adamw", "optim=muon"]
    muon, gaps = np.array([1.5, 2.4, 3.3]), np.array([-0.5, -0.6, -0.7])
    row = cells(findings.result(group))
    assert row["seeds"] == "3"
    assert row["bits per byte"] == f"{muon.mean():.4f} ± {4.303 * muon.std(ddof=1) / 3**0.5:.4f}"
    assert row["difference"] == f"{gaps.mean():+.4f} ± {4.303 * gaps.std(ddof=1) / 3**0.5:.4f}"
    assert row["verdict"] == "better"
    assert findings.verdict(group) == f"optim=muon ({row['difference']}) is better than optim=adamw, in bits per byte."
    assert findings.question([group]) == "Is optim=muon better than optim=adamw, at equal steps?"
    cost = cells(findings.cost(group, {}))
    assert cost["trained for"] == "4.0 s"  # 40 steps of 100 tokens at 1000 a second
    assert (cost["tokens"], cost["tokens/s"]) == ("4,000", "1,000")
    chosen, derived = findings.differences(group)
    assert list(chosen.rows) == [["optim", "adamw", "muon"]]
    assert list(derived.rows) == [["optim.groups.matrices.rule", "adamw", "muon"]]


def test_the_arm_to_compare_with(tmp_path):
    sweep = write_sweep(tmp_path / "sweep")
    [group] = groups(sweep, against="optim=muon")
    assert cells(findings.result(group))["verdict"] == "worse"
    with pytest.raises(UserError, match="there are optim=adamw, optim=muon"):
        groups(sweep, against="muon")
    write_run(tmp_path / "features" / "0", 1.0, words=["+mtp=on"], optim="a")
    write_run(tmp_path / "features" / "1", 1.0, words=["+mtp=off"], optim="b")
    assert groups(tmp_path / "features")[0].reference.name == "+mtp=off"


def test_what_has_no_result_is_listed_and_not_averaged(tmp_path):
    sweep = write_sweep(tmp_path / "sweep")
    write_run(sweep / "6", None, 3, ["optim=muon"])
    write_run(sweep / "7", 1.0, 4, ["optim=muon"], status="failed", error="RuntimeError: out\nof memory")
    write_run(sweep / "8", 1.0, 5, ["optim=muon"], status="stopped", step=7)
    half = write_run(sweep / "9", 1.0, 6, ["optim=muon"])
    (half / "summary.json").write_text('{"status": "fin')
    foreign = sweep / "10"
    foreign.mkdir()
    (foreign / "config.yaml").write_text("name: another program\n")
    bomb = sweep / "11"
    bomb.mkdir()
    (bomb / "config.yaml").write_text("a: &a [1, 2]\nb: *a\nmodel: {}\n")
    (sweep / "12").mkdir()
    row = "13,optim=muon seed=9,,,,,,no text.\n"
    (sweep / "sweep.csv").write_text("job,overrides,val/loss,val/bpb,tokens,bytes,folder,error\n" + row)
    [group] = groups(sweep)
    result = findings.result(group)
    assert result.rows[1][:3] == ["optim=muon", "3 of 8", "2.4000 ± 2.2359"]
    missing = findings.left_out([group])
    assert missing is not None
    reasons = {Path(row[3]).name: row[2] for row in missing.rows}
    assert reasons == {
        "6": "its val/bpb is not a number",
        "7": "failed: RuntimeError: out of memory",
        "8": "stopped at step 7",
        "9": "stopped at step 40",
        "10": "is not a run of nanochat",
        "11": "its config.yaml is not one that nanochat writes",
        "12": "holds no run",
        "13": "failed: no text.",
    }


def test_runs_that_chose_a_rate_are_not_judged(tmp_path):
    sweep = write_sweep(tmp_path / "sweep")
    write_run(sweep / "tuning" / "optim=muon", 0.1, 1000, ["optim=muon"])
    [group] = groups(sweep)
    assert [run.seed for run in group.arms[1].good] == [0, 1, 2]


def test_different_texts_are_set_apart(tmp_path):
    first = write_run(tmp_path / "a", 1.0, 0)
    other = write_run(tmp_path / "b", 2.0, 1, paths="b")
    grown = write_run(tmp_path / "c", 3.0, 2, text=TEXT.replace("54", "99"))  # the same folder, with more in it
    found = groups(first, other, grown)
    assert [[[run.seed for run in arm.good] for arm in group.arms] for group in found] == [[[0]], [[2]], [[1]]]
    assert "3 different texts" in findings.warnings(found)[0]
    page = Report(found, "x").html()
    assert page.count('<p class="verdict">') == 3


def test_arms_without_a_common_seed(tmp_path):
    write_run(tmp_path / "s" / "0", 1.0, 0, ["optim=a"], optim="a")
    write_run(tmp_path / "s" / "1", 2.0, 1, ["optim=b"], optim="b")
    [group] = groups(tmp_path / "s")
    assert cells(findings.result(group))["verdict"] == "no common seed"
    assert "Nothing" not in findings.verdict(group)
    assert "no seed in common" in findings.verdict(group)
    assert any("no seed in common" in text for text in findings.warnings([group]))


def test_unequal_lengths_and_places_are_said(tmp_path):
    write_run(tmp_path / "s" / "0", 1.0, 0, ["trainer.max_steps=40"])
    write_run(tmp_path / "s" / "1", 0.9, 0, ["trainer.max_steps=80"], steps=80, commit="def")
    [group] = groups(tmp_path / "s")
    assert [arm.name for arm in group.arms] == ["40 steps", "80 steps"]
    said = " ".join(findings.warnings([group]))
    assert "not trained for the same number of steps" in said
    assert "different commits" in said
    assert findings.question([group]).endswith("than 40 steps?")


def test_a_run_of_before_and_a_single_run(tmp_path):
    run = write_run(tmp_path / "run", 1.25)
    [group] = groups(run)
    assert findings.verdict(group) == "tiny reaches 1.2500 bits per byte, one seed."
    assert findings.question([group]) == "How good is tiny?"


def test_no_path_of_the_machine_is_on_a_page(tmp_path, monkeypatch, capsys):
    """Wherever the runs lie and the command is typed; paths are shown as they were given to the runs."""
    here, elsewhere = tmp_path / "here" / "work", tmp_path / "elsewhere"
    here.mkdir(parents=True)
    elsewhere.mkdir()
    sweep = here / "sweep"
    text, other = str(here / "texts" / "books"), str(here / "deep" / "down" / "books")
    words = ["data.paths=[texts/books]"]
    command = {"command": f"cli.py data.paths=[texts/books] hydra.run.dir='{sweep}/0'"}  # as earlier versions wrote it
    write_run(sweep / "0", 1.0, 0, words, paths=text, **command)
    write_run(sweep / "1", 1.0, 0, [*words, "optim=muon"], paths=text, optim="m", command="train.py -m optim=a,b")
    write_run(sweep / "2", 1.0, 1, words, paths=text, status="failed", error=f"OSError: no room in {sweep}/2.")
    write_run(sweep / "3", 1.0, 2, [], paths=other, command=f"nanochat train hydra.run.dir={sweep}/3")
    (sweep / "4").mkdir()
    for place, folder in ((here, "sweep"), (here, str(sweep)), (sweep / "0", ".."), (elsewhere, str(sweep))):
        monkeypatch.chdir(place)
        assert nanochat.cli.main(["report", folder, "--html", "page.html", "--md", "page.md"]) == 0
        pages = [Path("page.html").read_text().replace("&#x27;", "'"), Path("page.md").read_text()]
        assert all(f"{here}/texts" not in page and f"{here}/deep" not in page for page in pages)
        assert all("sweep/4" in page for page in pages)
        assert "'texts/books'" in pages[0]
        if place == here:
            assert "'deep/down/books'" in pages[0]  # that no override names
            for page in pages:
                assert str(tmp_path) not in page
                assert "nanochat train data.paths=[texts/books] hydra.run.dir=" in page
                assert "python train.py -m optim=a,b" in page
                assert "OSError: no room in sweep/2." in page
    assert "'…/down/books'" in pages[0]


def test_paths_as_they_were_typed():
    said = ["data.paths=[texts/a,/mnt/b]", "seed=1"]
    given = {"paths": ["/home/me/texts/a", "/mnt/b", "/opt/lib/python/c.py"], "lr": 0.1, "name": "a/b"}
    assert as_typed(given, said) == {
        "paths": ["texts/a", "/mnt/b", "…/python/c.py"], "lr": 0.1, "name": "a/b",
    }  # fmt: skip


def test_texts_from_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = [f"'{tmp_path}/a b/c'", f"at {tmp_path}.", f"{tmp_path}-2/x", f"/mnt{tmp_path}/x", f"x={tmp_path}/y"]
    assert from_here(given) == ["'a b/c'", "at ..", f"{tmp_path}-2/x", f"/mnt{tmp_path}/x", "x=y"]


@pytest.mark.parametrize(("name", "said"), [("nowhere", "there is no folder"), ("empty", "has no runs in it")])
def test_mistakes(name, said, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert nanochat.cli.main(["report", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.rglob("*.html"))


def test_a_page_that_cannot_be_written(tmp_path, capsys):
    run = write_run(tmp_path / "run", 1.25)
    assert nanochat.cli.main(["report", str(run), "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_page_is_there_though_the_reader_of_the_table_leaves(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", 1.25)

    def left(self):
        raise BrokenPipeError

    monkeypatch.setattr(Report, "show", left)
    monkeypatch.setattr(nanochat.cli.sys.stderr, "close", lambda: None)
    assert nanochat.cli.main(["report", str(run), "--md", str(tmp_path / "page.md")]) == 0
    assert (run / "report.html").exists()
    assert (tmp_path / "page.md").exists()


EVIL = "task_name=<script>window.broken=1</script>|`*_x_*`"


def test_names_are_text_everywhere(tmp_path, capsys):
    write_run(tmp_path / "s" / "0", 1.0, 0, [EVIL], optim="a")
    write_run(tmp_path / "s" / "1", 2.0, 0, ["optim=b"], optim="<img src=x>")
    words = ["report", str(tmp_path / "s"), "--md", str(tmp_path / "page.md"), "--question", "<i>Why?</i>"]
    assert nanochat.cli.main(words) == 0
    assert "<script>" in capsys.readouterr().out
    tags: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)

    Reader().feed((tmp_path / "s" / "report.html").read_text())
    assert tags.count("script") == 1
    assert not {"img", "i", "b"} & set(tags)
    markdown = (tmp_path / "page.md").read_text()
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") in (4, 6, 7, 8) for line in table)
    assert "\\<i>Why?" in markdown


def test_twelve_runs_take_seconds(tmp_path, capsys):
    sweep = tmp_path / "sweep"
    for i in range(12):
        write_run(sweep / str(i), 1.0 + i, i % 2, [f"optim={i // 2}"], optim=str(i // 2), steps=2000)
    start = time.monotonic()
    assert nanochat.cli.main(["report", str(sweep)]) == 0
    assert time.monotonic() - start < 10
    assert (sweep / "report.html").stat().st_size < 1e6
