"""Every command of the README does what it says, as far as composing it tells."""

import re
import shlex
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from nanochat.bench import cli as bench
from nanochat.cli import VERBS
from nanochat.config.compose import compose

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    part.strip()
    for text in re.findall(r"^    (?:\$ )?(.+)$|`(python train\.py [^`]+|nanochat [^`]+)`", README, re.MULTILINE)
    for line in text
    for part in line.split("#")[0].split("&&")
    if part.strip().startswith(("python train.py", "nanochat ", "make "))
]


def jobs(words: list[str]) -> list[list[str]]:
    """A command's overrides, one list for each job of a sweep."""
    if "-m" not in words:
        return [words]
    overrides = OverridesParser.create().parse_overrides([w for w in words if w != "-m"])
    return [list(job) for batch in BasicSweeper.split_arguments(overrides, max_batch_size=None) for job in batch]


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_command(command, tmp_path, monkeypatch):
    program, *words = shlex.split(command)
    if program == "make":
        assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text()
        return
    if program == "nanochat":
        verb, *words = words
        assert verb in VERBS
        if verb == "bench":
            assert (Path(bench.__file__).parent / f"{words[0]}.py").exists()
            return
        if verb == "compare":
            from nanochat.studies.cli import parser

            options = parser().parse_intermixed_args(words)
            words = [*options.overrides, *shlex.split(" ".join(options.arms or []))]
        elif verb == "train":
            words = [w for w in words if "=" in w]
        elif verb != "params":
            return
    else:
        words = words[1:]
    if "+mpt=on" in words or words == ["--help"]:
        return
    (tmp_path / "books").mkdir()
    (tmp_path / "notes.txt").write_text("some words\n" * 50)
    (tmp_path / "books" / "one.txt").write_text("more words\n" * 50)
    monkeypatch.chdir(tmp_path)
    for job in jobs(words):
        compose(job)


@pytest.mark.parametrize("line", [*COMMANDS, *re.findall(r"^    (pip .+)$", README, re.MULTILINE)])
def test_brackets_are_quoted(line):
    """zsh takes bare ones for a glob, and refuses the command when no file matches."""
    for word in shlex.split(line, posix=False):
        assert "[" not in word or word.startswith("'")


def test_there_are_commands():
    assert len(COMMANDS) >= 15
    assert sum("train.py" in command for command in COMMANDS) >= 5


def test_the_tables_are_complete():
    for group in sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name != "hydra"):
        for option in (ROOT / "conf" / group).glob("*.yaml"):
            if option.stem != "base":
                assert f"`{option.stem}`" in README, f"the README does not name {group}={option.stem}"
