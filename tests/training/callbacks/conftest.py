"""One run with every callback, which several files look at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanochat.run import train
from tests.runs import configure
from tests.training.callbacks.short_runs import RUN


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("callbacks")


@pytest.fixture(scope="session")
def whole(place: Path) -> tuple[Path, dict[str, float]]:
    """The run's folder, and its metrics."""
    folder, threads = place / "outputs" / "today" / "whole", torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return folder, train(configure(place, RUN), folder)
    finally:
        torch.set_num_threads(threads)
