"""Every command of the README does what it says, as far as composing it tells."""

import re
import shlex

import pytest

from nanochat.errors import UserError
from tests.commands import ROOT, check_command, commands_in, parsed

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = commands_in(README)


@pytest.mark.parametrize(
    "command",
    ["generate latest --promt x", "verify --run latest", "export latest --to gguff", "bench step --preset d20",
     "bench stepp", "serve latest --prot 1", "doctor --second 5"],
)  # fmt: skip
def test_a_command_with_a_mistake_is_found(command, monkeypatch):
    verb, *words = command.split()
    with pytest.raises(UserError):
        parsed(verb, words, monkeypatch)


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_command(command, tmp_path, monkeypatch):
    check_command(command, tmp_path, monkeypatch)


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
