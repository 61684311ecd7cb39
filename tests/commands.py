"""Commands in Markdown: found, and fed to the real parsers and to Hydra's composition, without training."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep

from nanochat.cli import VERBS
from nanochat.config.compose import compose
from nanochat.console import Parser
from nanochat.errors import ConfigError
from nanochat.studies.runner import merged

ROOT = Path(__file__).parents[1]


def commands_in(text: str) -> list[str]:
    """The commands of a Markdown page: in indented and fenced blocks, and between backticks."""
    fenced = "\n".join(re.findall(r"^```.*\n((?:.*\n)*?)```", text, re.MULTILINE))
    text = re.sub(r"^(?=.)", "    ", fenced, flags=re.MULTILINE) + "\n" + text
    found = re.findall(r"^    (?:\$ )?(.+)$|`(python train\.py [^`]+|nanochat [\w-]+ [^`]+)`", text, re.MULTILINE)
    return [
        part.strip()
        for lines in found
        for line in lines
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


def jobs(words: list[str]) -> list[list[str]]:
    """A command's overrides, one list for each job of a sweep; of an interval to search in, its beginning."""
    if "-m" not in words:
        return [words]
    machinery = ("-m", "hydra/launcher=", "hydra/sweeper=", "hydra.launcher.", "hydra.sweeper.")
    words = [w for w in words if not w.startswith(machinery)]
    overrides = []
    for override in OverridesParser.create().parse_overrides(words):
        value = override.value()
        if isinstance(value, IntervalSweep):
            override = OverridesParser.create().parse_override(f"{override.get_key_element()}={value.start}")
        overrides.append(override)
    return [list(job) for batch in BasicSweeper.split_arguments(overrides, max_batch_size=None) for job in batch]


def check_command(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int | None = None) -> None:
    """Parse a command; one that trains is composed, too, with every job of a sweep, or the last `most` of them.

    That this machine lacks a device which a command asks for is no mistake of the command.
    """
    program, *words = shlex.split(command)
    arms: list[list[str]] = []
    if program == "make":
        assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text()
        return
    if program == "nanochat":
        verb, *words = words
        assert verb in VERBS
        if verb == "compare":
            from nanochat.studies.cli import parser

            options = parser().parse_intermixed_args(words)
            words, arms = options.overrides, [merged(options.overrides, shlex.split(arm)) for arm in options.arms or []]
        elif verb in ("train", "data"):
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
    for job in [*jobs(words)[-most if most else None :], *arms]:
        try:
            compose(job)
        except ConfigError as error:
            if not all("this machine has no such device" in problem for problem in error.problems):
                raise
