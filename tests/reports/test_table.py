"""One table in three forms."""

from html.parser import HTMLParser

import pytest

from nanochat.reports import sweep
from nanochat.reports.table import Table

NASTY = Table(
    "<b>title</b>",
    ["arm", "value", "said"],
    [["a|b", 1.25, "[bold]"], ["<script>", 1234567, "two\nlines"], ["&amp;", "", "-"]],
    ["a <note>"],
)


def test_markdown_keeps_its_columns():
    lines = NASTY.markdown().splitlines()
    assert lines[2:6] == [
        "| arm | value | said |",
        "| --- | ---: | --- |",
        "| a\\|b | 1.25 | [bold] |",
        "| \\<script> | 1234567 | two lines |",
    ]
    assert lines[-1] == "a <note>"


def test_html_escapes_everything():
    found, tags = [], set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.add(tag)

        def handle_data(self, data):
            found.append(data)

    Reader().feed(NASTY.html())
    assert tags == {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"}
    assert {"<b>title</b>", "a|b", "<script>", "&amp;", "a <note>"} <= set(found)


def test_the_terminal_shows_brackets_as_they_are(capsys):
    NASTY.show()
    out = capsys.readouterr().out
    for text in ("<b>title</b>", "[bold]", "<script>", "a <note>"):
        assert text in out


def make_job(tmp_path, number, words, bpb):
    folder = tmp_path / str(number)
    folder.mkdir()
    (folder / "summary.json").write_text(f'{{"val/bpb": {bpb}, "val/loss": {2 * bpb}, "optim/bytes": 8}}')
    return sweep.Job(number, words, folder)


def test_seeds_are_put_together(tmp_path, capsys):
    """Best setting first, with the mean and the standard deviation over its seeds."""
    jobs = [
        make_job(tmp_path, i, ["model=tiny", f"optim={optim}", f"seed={seed}"], bpb)
        for i, (optim, seed, bpb) in enumerate([("a", 0, 2.0), ("a", 1, 2.5), ("b", 0, 1.0), ("b", 1, 1.5)])
    ]
    jobs.append(sweep.Job(4, ["model=tiny", "optim=b", "seed=2"], tmp_path / "4", RuntimeError("broke")))
    table = sweep.over_seeds(jobs, {"model=tiny"})
    assert [row[:2] for row in table.rows] == [["optim=b", "2 of 3"], ["optim=a", "2 of 2"]]
    assert table.rows[0][3] == "1.2500 ± 0.3536"
    assert table.rows[0][5] == "8.0000"
    assert not sweep.over_seeds(jobs[::2], set()).rows[1:]
    sweep.report(jobs, tmp_path)
    out = capsys.readouterr().out
    assert "job 4 (optim=b seed=2) failed: RuntimeError: broke" in out
    assert "By setting" in out


def test_a_pruned_job_is_marked_and_takes_part_in_no_mean(tmp_path, capsys):
    jobs = [make_job(tmp_path, i, ["optim=a", f"seed={i}"], 2.0 - i / 2) for i in range(3)]
    (jobs[2].folder / "summary.json").write_text('{"val/bpb": 1.0, "val/loss": 2.0, "status": "pruned"}')
    assert [row[1:4] for row in sweep.over_seeds(jobs, set()).rows] == [
        ["2 of 3", "3.5000 ± 0.7071", "1.7500 ± 0.3536"]
    ]
    sweep.report(jobs, tmp_path)
    out = capsys.readouterr().out
    assert "1 pruned: ended early" in out
    lines = (tmp_path / "sweep.csv").read_text().splitlines()
    assert [line[0] for line in lines[1:]] == ["1", "0", "2"]


def test_records_of_jobs_in_other_processes(tmp_path):
    from nanochat.errors import ConfigError

    jobs = [
        sweep.Job(1, ["seed=1"], tmp_path / "1", ConfigError(["one.", "two."])),
        sweep.Job(10, ["seed=10"], tmp_path / "10", ValueError("bad")),
        sweep.Job(0, ["seed=0"], tmp_path / "0"),
    ]
    for job in jobs:
        job.record(tmp_path)
    found = sweep.collect(tmp_path)
    assert [job.number for job in found] == [0, 1, 10]
    assert [None if job.error is None else sweep.sentence(job.error) for job in found] == [
        None,
        "one. two.",
        "ValueError: bad",
    ]
    assert sweep.exit_code(found) == 1
    assert sweep.exit_code(found[:2]) == 2


@pytest.mark.parametrize(("cells", "right"), [(["1", "", "x"], True), (["", ""], False), (["+0.1 ± 2", "-"], True)])
def test_columns_of_numbers_are_set_to_the_right(cells, right):
    assert Table("", ["a"], [[cell] for cell in cells]).numeric() == [right]
