"""A folder of small texts, and a cache that is no one else's."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

WORDS = ["the", "of", "token", "tree", "def", "return", "import", "self", "über", "naïve", "漢字", "🙂", "x", "1", "42"]


def make_text(seed: int, lines: int) -> str:
    """Some lines of words, the same for the same seed."""
    draw = random.Random(seed)
    return "".join(" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) + "\n" for _ in range(lines))


@pytest.fixture
def corpus_dir(tmp_path) -> Path:
    """60 files of some 40 lines in two folders."""
    root = tmp_path / "corpus"
    for number in range(60):
        path = root / f"part{number % 2}" / f"file{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(make_text(number, 40), encoding="utf-8")
    return root


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"
