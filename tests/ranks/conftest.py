"""Ranks that all tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import runs
from tests.ranks.pools import Pool, pool


@pytest.fixture(scope="package")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with pool(2, tmp_path_factory.mktemp("two") / "store") as made:
        yield made


@pytest.fixture(scope="package")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with pool(4, tmp_path_factory.mktemp("four") / "store") as made:
        yield made


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    with runs.one_thread():
        yield
