"""Errors that a user caused and can mend: the entry points print them as one sentence and exit with code 2."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Something the user gave (a file, an option, a machine) cannot be used; the message says which and what to do."""

    exit_code = 2
    """of the command that ends with it"""


class InUseError(UserError):
    """Another process uses the folder."""


class DivergedError(UserError):
    """A run came to its end, but not to a model that can be used."""

    exit_code = 1


class ConfigError(UserError):
    """One or more problems of a configuration, gathered before anything is built.

    `problems` holds each problem as one sentence; `str(error)` lists them all.
    """

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            text = self.problems[0]
        else:
            text = f"{len(self.problems)} problems in the configuration:" + "".join(f"\n  - {p}" for p in self.problems)
        super().__init__(text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence: `; did you mean 'x'?`, or the known words when none is near (at most twelve)."""
    words = sorted(set(map(str, known)))
    near = difflib.get_close_matches(str(word), words, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    if not words:
        return "; there are none."
    return f"; there are {', '.join(words[:12])}{', ...' if len(words) > 12 else '.'}"


def print_error(error: BaseException | str) -> None:
    """`error: ...` on stderr, after everything that was printed before."""
    sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr, flush=True)
