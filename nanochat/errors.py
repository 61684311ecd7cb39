"""Errors that a user caused and can mend: the entry points print them as one sentence and exit with code 2."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Something the user gave (a file, an option, a machine) cannot be used; the message says which and what to do."""


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
