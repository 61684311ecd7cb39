import math

import pytest
import yaml

from nanochat import optim
from nanochat.errors import UserError
from nanochat.optim import WSD, Constant, Cosine, Linear
from nanochat.optim.schedule import WEIGHT_DECAY_SCHEDULES
from tests.optim.helpers import CONF


def test_warmup_scales_step_zero_and_is_at_most_a_tenth():
    schedule = Constant(warmup_steps=20)
    assert [schedule(s, 1000) for s in (0, 9, 19, 20, 999)] == pytest.approx([1 / 20, 10 / 20, 1, 1, 1])
    assert [schedule(s, 50) for s in (0, 4, 5)] == pytest.approx([1 / 5, 1, 1])
    assert Constant(warmup_steps=20)(0, 5) == 1.0, "a run of 5 steps has no warm-up"


def test_wsd_formula():
    schedule = WSD(warmup_steps=10, decay_fraction=0.4, floor=0.05)
    for step in range(200):
        expected = min(1, (step + 1) / 10) * (1 if step < 120 else 0.05 + 0.95 * (200 - step) / 80)
        assert schedule(step, 200) == pytest.approx(expected)
    assert schedule(200, 200) == pytest.approx(0.05)


def test_linear_and_cosine_formulas():
    for step in range(10, 100):
        t = (step - 10) / 90
        assert Linear(warmup_steps=10, floor=0.2)(step, 100) == pytest.approx(0.2 + 0.8 * (1 - t))
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * t)) / 2
        assert Cosine(warmup_steps=10, floor=0.1)(step, 100) == pytest.approx(cosine)
    assert Linear()(99, 100) == pytest.approx(0.01), "the last step still moves"
    assert Cosine(floor=0.1)(10_000, 100) == pytest.approx(0.1)


def test_weight_decay_schedules():
    constant, linear, first_half = (WEIGHT_DECAY_SCHEDULES[k] for k in ("constant", "linear", "first_half"))
    assert [constant(s, 10) for s in (0, 9)] == [1, 1]
    assert [linear(s, 10) for s in (0, 5, 10)] == pytest.approx([1, 0.5, 0])
    assert [first_half(s, 10) for s in (0, 4, 5, 9)] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Constant(warmup_steps=-1), "warmup_steps"),
        (lambda: WSD(decay_fraction=1.5), "decay_fraction"),
        (lambda: Linear(floor=-0.1), "floor"),
    ],
)
def test_bad_values(make, word):
    with pytest.raises(UserError, match=word):
        make()


@pytest.mark.parametrize("path", sorted((CONF.parent / "schedule").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_build(path):
    node = yaml.safe_load(path.read_text())
    schedule = getattr(optim, node.pop("_target_").removeprefix("nanochat.optim."))(**node)
    assert all(0 < schedule(step, 50) <= 1 for step in range(50))
