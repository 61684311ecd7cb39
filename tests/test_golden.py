"""The first losses of every optimizer, to the digits that say whether a constant has changed."""

import json

import pytest

from nanochat.config.compose import compose
from tests.golden.losses import FILE, OPTIMIZERS, losses, options

GOLDEN = json.loads(FILE.read_text()) if FILE.exists() else {}


SAME_EVERYWHERE = 6  # steps; from then on a trit that flips by rounding, which machines differ in, can be seen


def differs(found: list[float], golden: list[float]) -> bool:
    """Whether any of the first steps is off by more than 2e-5, relatively."""
    return any(abs(f / g - 1) > 2e-5 for f, g in zip(found[:SAME_EVERYWHERE], golden, strict=False))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_losses_are_the_recorded_ones_and_would_show_a_changed_rate(optimizer):
    assert optimizer in GOLDEN, "record it: python -m tests.golden.losses"
    found = losses(optimizer)
    assert not differs(found, GOLDEN[optimizer]), found
    assert found[-1] < found[0] - 0.2
    rate = compose(options(optimizer))["optim"]["lr"]
    assert differs(losses(optimizer, [f"optim.lr={1.05 * rate}"]), GOLDEN[optimizer])
