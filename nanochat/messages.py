"""How mistakes are put to the user."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable


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
