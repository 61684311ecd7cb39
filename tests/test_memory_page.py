"""docs/memory.md says what is counted today, and the bench measures what is predicted."""

import json
import sys
from pathlib import Path

import pytest

import nanochat.cli
from nanochat.bench import memory
from nanochat.bench.measure import options_of

PAGE = (Path(__file__).parents[1] / "docs" / "memory.md").read_text(encoding="utf-8")


def test_every_experiment_has_a_row():
    assert memory.line(memory.HEADINGS) in PAGE
    missing = [name for name in options_of("experiment") if f"\n| {name} | " not in PAGE]
    assert not missing, "run `nanochat bench memory --table`"


def test_the_smallest_row_is_what_is_counted_now():
    assert memory.line(memory.row("tiny")) in PAGE, "run `nanochat bench memory --table`"


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_predicted_is_nearly_measured(capsys):
    words = ["model=tiny", "data.batch_size=32", "trainer.precision=32-true", "trainer=cpu", "tokenizer=byte"]
    assert nanochat.cli.main(["bench", "memory", "--json", "--steps", "2", *words]) == 0
    found = json.loads(capsys.readouterr().out)["configurations"]["yours"]
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.15)
    assert found["predicted"] == sum(found["parts"].values())
