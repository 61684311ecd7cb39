"""All tests of this folder compute on one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import runs


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with runs.one_thread():
        yield
