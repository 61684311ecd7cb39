"""The first losses of every optimizer, to the digits that say whether a constant has changed."""

import json

import pytest

from nanochat.config import compose
from tests.golden.losses import FILE, OPTIMIZERS, STEPS, losses, options

GOLDEN = json.loads(FILE.read_text()) if FILE.exists() else {}


def differs(found: list[float], golden: list[float]) -> bool:
    """Whether any step is off by more than 1e-5 (the first) to 1e-3 (the last), relatively."""
    tolerance = [1e-5 * 100 ** (step / (STEPS - 1)) for step in range(STEPS)]
    return any(abs(f / g - 1) > t for f, g, t in zip(found, golden, tolerance, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_losses_are_the_recorded_ones_and_would_show_a_changed_rate(optimizer):
    assert optimizer in GOLDEN, "record it: python -m tests.golden.losses"
    found = losses(optimizer)
    assert not differs(found, GOLDEN[optimizer]), found
    assert found[-1] < found[0] - 0.2
    rate = compose(options(optimizer))["optim"]["lr"]
    assert differs(losses(optimizer, [f"optim.lr={1.01 * rate}"]), GOLDEN[optimizer])
