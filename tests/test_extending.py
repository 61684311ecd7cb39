"""docs/extending.md, done: a user's own package and options, outside of nanochat, through the real command."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from nanochat import launch
from nanochat.data.sources import find
from tests.runs import read_metrics, read_state, same

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = [block.strip() for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)]
[_CONSOLE] = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
MISTAKES = re.findall(r"^\$ (.*)\n(.*)$", _CONSOLE, re.MULTILINE)
[_DIFF] = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
INSIDE = [(new, what.strip()) for new, what in re.findall(r"^\+ (\S+) *(.*)$", _DIFF, re.MULTILINE)]


def write_files(place: Path) -> None:
    for name, text in FILES.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text, encoding="utf-8")
    (place / "verses" / "__init__.py").touch()


def run(command: str, place: Path, root: Path = ROOT, **environment: str) -> str:
    """What a command of the page prints, by train.py."""
    words = shlex.split(command)
    assert words[:2] == ["nanochat", "train"]
    path = os.pathsep.join([str(root), str(place)])
    env = {**os.environ, "PYTHONPATH": path, "NANOCHAT_CACHE": str(place / "cache"), **environment}
    call = [sys.executable, str(root / "train.py"), *words[2:]]
    done = subprocess.run(call, cwd=place, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the page's package, in which its first command has been run."""
    place = tmp_path_factory.mktemp("project")
    write_files(place)
    (place / "card.txt").write_text(run(COMMANDS[0], place))
    return place


def test_the_page_has_what_it_promises() -> None:
    assert len(COMMANDS) == 2
    assert len(MISTAKES) >= 12
    options = {Path(name).parent.name for name in FILES if name.startswith("conf/")}
    assert options == {"probe", "heartbeat", "optim", "schedule", "data", "logger", "experiment"}


def test_everything_takes_part(project: Path) -> None:
    folder = project / "run"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["task_name"], config["probe"]["weight"]) == ("verses", 0.2)  # the experiment's
    rows = read_metrics(folder)
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [1, 2, 3, 4, 5, 6]
    errors = [float(row["probe/error"]) for row in rows if row.get("probe/error")]
    assert errors[-1] < errors[0]  # the objective has a gradient
    rates = [float(row["train/lr"]) for row in rows if row["train/lr"]]
    assert rates == pytest.approx([0.002] * 4 + [0.001] * 2)  # the schedule
    assert (folder / "heartbeat.txt").read_text().split() == ["2", "4", "6"]
    lines = [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]
    assert any("val/bpb" in line for line in lines)
    assert any("probe/error" in line for line in lines)
    assert list((project / "cache" / "data").glob("verses-*"))  # the corpus
    state = read_state(folder)
    assert {"objectives.probe.read.weight", "objectives.probe.read.bias"} <= set(state["state_dict"])
    [optimizer] = state["optimizer_states"]
    [group] = optimizer["groups"]
    assert (group["rule"], len(group["names"])) == ("sign", len(state["state_dict"]))
    momentum = optimizer["state"]["objectives.probe.read.weight"]["momentum"]
    assert momentum.abs().max() > 0


def test_the_card_names_them_and_a_resume_that_finds_them(project: Path) -> None:
    card = (project / "card.txt").read_text()
    assert re.search(r"^techniques +probe, heartbeat *$", card, re.MULTILINE)
    assert "nanochat train --resume run trainer.max_steps=12 --config-dir conf" in card


def test_a_resume_is_exact(project: Path) -> None:
    """The run as if killed after step 3, and resumed."""
    killed = project / "killed"
    shutil.copytree(project / "run", killed)
    (killed / "checkpoints" / "step=6.ckpt").unlink()
    shutil.copy(killed / "checkpoints" / "step=3.ckpt", killed / "checkpoints" / "last.ckpt")
    run("nanochat train --resume killed --trust", project)
    same(read_state(project / "run"), read_state(killed))
    assert read_metrics(project / "run") == read_metrics(killed)


def test_a_run_of_foreign_parts_is_extended(project: Path) -> None:
    shutil.copytree(project / "run", project / "longer")
    run(COMMANDS[1].replace("--resume run", "--resume longer") + " logger.lines.path=longer/lines.jsonl", project)
    assert read_state(project / "longer")["global_step"] == 9


@pytest.fixture
def importable(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(project))
    monkeypatch.chdir(project)
    forget()
    yield project
    forget()


def forget() -> None:
    """The package, of which each test has a copy of its own."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "verses"]:
        del sys.modules[name]
    find.cache_clear()


def refused(capfd: pytest.CaptureFixture, *words: str) -> str:
    """What the command says, having written nothing."""
    before = sorted(Path.cwd().iterdir())
    capfd.readouterr()
    try:
        code = launch.main(words)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert sorted(Path.cwd().iterdir()) == before
    return capfd.readouterr().err.strip()


@pytest.mark.parametrize(("command", "sentence"), MISTAKES, ids=[command[28:] for command, _ in MISTAKES])
def test_mistakes_are_named(importable: Path, capfd: pytest.CaptureFixture, command: str, sentence: str) -> None:
    assert refused(capfd, *shlex.split(command)[2:]) == sentence


REGISTRATIONS = {
    "objective": ("conf/probe/on.yaml", "_target_: verses.objectives.Probe", "probe.weight"),
    "callback": ("conf/heartbeat/on.yaml", "_target_: verses.callbacks.Heartbeat", "heartbeat.every_n_steps"),
    "rule": ("conf/optim/sign.yaml", "rule: verses.rules.Sign", "optim.groups.all"),
    "schedule": ("conf/schedule/staircase.yaml", "_target_: verses.schedules.Staircase", "schedule has no _target_"),
    "corpus": ("conf/data/verses.yaml", "corpus: verses.corpora.Verses", "not an option of data.corpus=stdlib"),
    "logger": ("conf/logger/lines.yaml", "_target_: verses.loggers.Lines", "logger.lines"),
    "experiment": ("conf/experiment/verses.yaml", '- /probe: "on"', "probe is not on"),
}
"""the line of a file that makes something part of the run, and what the error without it says"""


@pytest.mark.parametrize("kind", REGISTRATIONS)
def test_without_its_registration_it_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, kind: str
) -> None:
    """The line that names it, its whole file, or its class is removed: the same command is refused each time."""
    write_files(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    forget()
    name, line, missed = REGISTRATIONS[kind]
    path = tmp_path / name
    words = shlex.split(COMMANDS[0])[2:]
    assert line in FILES[name]
    path.write_text(FILES[name].replace(line, ""))
    assert missed in refused(capfd, *words)
    path.unlink()
    assert f"{path.parent.name} has no option" in refused(capfd, *words) or path.parent.name == "probe"
    if kind != "experiment":
        path.write_text(FILES[name])
        *_, module, attribute = line.rstrip("}").split()[-1].split(".")
        code = tmp_path / "verses" / f"{module}.py"
        code.write_text(re.sub(rf"\b{attribute}\b", f"{attribute}2", FILES[f"verses/{module}.py"]))
        forget()
        assert f"verses.{module} has no {attribute!r}; did you mean '{attribute}2'?" in refused(capfd, *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("_target_: verses.callbacks.Path\n", "is neither an Objective nor a Callback"),
        ("_target_: verses.objectives.torch.relu\n", "is neither an Objective nor a Callback"),
        ("speed: 3\n", "idle.speed takes no part in the run: nothing reads it"),
        ("# nothing\n", "+idle=on takes no part in the run"),
        ("# @package model.idle\nspeed: 3\n", "model.idle is not an argument"),
        ("# @package _global_\nidle2: {speed: 3}\n", "idle2 is not a key of the configuration"),
    ],
)
def test_a_feature_that_takes_no_part_is_refused(
    importable: Path, capfd: pytest.CaptureFixture, text: str, words: str
) -> None:
    path = importable / "conf" / "idle" / "on.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert words in refused(capfd, "--config-dir", "conf", "+idle=on")


def test_the_flag_may_stand_anywhere_and_the_search_path_does_as_well(
    importable: Path, capfd: pytest.CaptureFixture
) -> None:
    expected = refused(capfd, "--config-dir", "conf", "+probe=on", "probe.weight=-1")
    assert refused(capfd, "+probe=on", "--config-dir", "conf", "probe.weight=-1") == expected
    path = f"hydra.searchpath=[file://{importable}/conf]"
    assert refused(capfd, "+probe=on", "probe.weight=-1", path) == expected


def test_a_resume_names_what_it_would_run(importable: Path, capfd: pytest.CaptureFixture) -> None:
    err = refused(capfd, "--resume", "run")
    for name in ("verses.objectives.Probe", "verses.callbacks.Heartbeat", "verses.rules.Sign", "verses.corpora.Verses"):
        assert f"={name} is neither nanochat's nor named by your own options" in err
    assert "verses" not in sys.modules


def test_inside_of_nanochat_each_is_one_file_and_one_yaml(tmp_path: Path) -> None:
    """The page's diff, applied to a copy of the package."""
    for name in ("nanochat", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", tmp_path)
    settings = {line.partition(": ")[0]: line for new, line in INSIDE if new.startswith("conf/")}
    for new, what in INSIDE:
        if new.startswith("tests/"):
            continue
        if new.endswith(".py"):
            text = FILES[what]
        else:
            key = what.partition(": ")[0]
            text = re.sub(rf"\b{key}: [\w.]+", settings[key], FILES[new])
            assert what in text
        (tmp_path / new).parent.mkdir(exist_ok=True)
        (tmp_path / new).write_text(text)
    words = "optim=sign +probe=on data=verses tokenizer=byte trainer=cpu trainer.max_steps=1 model.vocab_size=auto"
    words += " model.dim=32 model.n_layers=1 model.ffn_dim=64 data.seq_len=32 callbacks.sampler=null"
    run(f"nanochat train {words} hydra.run.dir=run", tmp_path, root=tmp_path)
    [group] = read_state(tmp_path / "run")["optimizer_states"][0]["groups"]
    assert group["rule"] == "sign"
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["corpus"] == "verses"
    assert torch.isfinite(read_state(tmp_path / "run")["state_dict"]["objectives.probe.read.weight"]).all()
