"""Every command of the README does what it says, as far as composing it tells."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from nanochat.cli import VERBS
from nanochat.config.compose import compose
from nanochat.console import Parser
from nanochat.errors import UserError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    part.strip()
    for text in re.findall(r"^    (?:\$ )?(.+)$|`(python train\.py [^`]+|nanochat [^`]+)`", README, re.MULTILINE)
    for line in text
    for part in line.split("#")[0].split("&&")
    if part.strip().startswith(("python train.py", "nanochat ", "make "))
]


class Parsed(Exception):
    """Ends a command once its words are understood."""


def parsed(verb: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Feed a command its words; it ends where it has understood them.

    Raises:
        UserError: it does not understand them.
    """

    def until_understood(parse):
        def stop(self, *args, **options):
            parse(self, *args, **options)
            raise Parsed

        return stop

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(Parser, name, until_understood(getattr(Parser, name)))
    module, function = VERBS[verb][0].split(":")
    with pytest.raises(Parsed):
        getattr(importlib.import_module(module), function)(words)


@pytest.mark.parametrize(
    "command",
    ["generate latest --promt x", "verify --run latest", "export latest --to gguff", "bench step --preset d20",
     "bench stepp", "serve latest --prot 1", "doctor --second 5"],
)  # fmt: skip
def test_a_command_with_a_mistake_is_found(command, monkeypatch):
    verb, *words = command.split()
    with pytest.raises(UserError):
        parsed(verb, words, monkeypatch)


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
        if verb == "compare":
            from nanochat.studies.cli import parser

            options = parser().parse_intermixed_args(words)
            words = [*options.overrides, *shlex.split(" ".join(options.arms or []))]
        elif verb == "train":
            words = [w for w in words if "=" in w]
        elif verb != "params":
            parsed(verb, words, monkeypatch)
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
