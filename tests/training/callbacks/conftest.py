"""One run with every callback, which several files look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanochat.run import train
from tests.runs import configure, one_thread
from tests.training.callbacks.short_runs import RUN


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("callbacks")


@pytest.fixture(scope="session")
def whole(place: Path) -> tuple[Path, dict[str, float]]:
    """The run's folder, and its metrics."""
    folder = place / "outputs" / "today" / "whole"
    with one_thread():
        return folder, train(configure(place, RUN), folder)
