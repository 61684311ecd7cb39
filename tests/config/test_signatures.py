"""The nodes of a configuration against the signatures of their targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from nanochat.config.signatures import check_arguments, check_nodes, fits
from tests.config.helpers import Demo, problems

HERE = "tests.config.helpers"


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"_target_": f"{HERE}.Demo"}, ["x.heads is missing"]),
        ({"_target_": f"{HERE}.Demo", "_partial_": True, "head": 2}, ["x.head is not", "did you mean 'heads'"]),
        ({"_target_": f"{HERE}.Demo", "heads": "many"}, ["x.heads=many", "a whole number"]),
        ({"_target_": f"{HERE}.Demo", "heads": True}, ["x.heads=true", "a whole number"]),
        ({"_target_": f"{HERE}.Demo", "heads": 1.5}, ["x.heads=1.5", "a whole number"]),
        ({"_target_": f"{HERE}.Demo", "heads": 1, "name": 5}, ["x.name=5", "a text or null"]),
        ({"_target_": f"{HERE}.Demo", "heads": 1, "parts": 5}, ["x.parts=5", "a list or null"]),
        ({"_target_": f"{HERE}.Demo", "_args_": [1], "heads": 1}, ["x.heads is given twice"]),
        ({"_target_": f"{HERE}.Dmeo", "heads": 1}, ["x._target_", "'Dmeo'", "did you mean 'Demo'"]),
        ({"_target_": "nanochat.model.confg.GPTConfig"}, ["'confg'", "did you mean 'config'"]),
        ({"_target_": "nanochta.model.config.GPTConfig"}, ["no package 'nanochta'", "did you mean 'nanochat'"]),
        ({"_target_": "tests.config.test_signatures.HERE"}, ["cannot be called"]),
        ({"_target_": "not a name"}, ["must be a dotted name"]),
        ({"_target_": f"{HERE}.Open", "head": 1}, ["x.head is not an argument", "did you mean 'heads'"]),
        ({"_target_": f"{HERE}.Strict", "mode": "mni"}, ["x.mode=mni", "one of min, max"]),
        ({"_target_": "lightning.pytorch.loggers.WandbLogger", "entitty": "me"}, ["did you mean 'entity'"]),
        (
            {"_target_": f"{HERE}.Demo", "heads": 1, "parts": [{"_target_": f"{HERE}.Demo"}]},
            ["x.parts.0.heads is missing"],
        ),
        ({"_target_": f"{HERE}.Demo", "heads": {"_target_": f"{HERE}.Demo", "haeds": 1}}, ["x.heads.haeds is not"]),
        ({"inner": {"_target_": f"{HERE}.Demo", "haeds": 1}}, ["x.inner.haeds", "did you mean 'heads'"]),
    ],
)
def test_nodes_are_compared_with_their_targets(node: dict[str, Any], words: list[str]) -> None:
    found = [str(problem) for problem in check_nodes(node, "x")]
    assert any(all(word in problem for word in words) for problem in found), found


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": f"{HERE}.Demo", "_partial_": True},
        {"_target_": f"{HERE}.Demo", "heads": 1, "scale": 2, "_convert_": "all", "_recursive_": False},
        {"_target_": f"{HERE}.Demo", "_args_": [1]},
        {"_target_": f"{HERE}.Open", "extra": True, "heads": 1},
        {"_target_": "lightning.pytorch.loggers.WandbLogger", "entity": "me", "mode": "offline"},
        {"_target_": "builtins.dict", "anything": 1},
        {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss", "patience": 3},
    ],
)
def test_good_nodes_pass(node: dict[str, Any]) -> None:
    assert check_nodes(node, "x") == []


def test_every_unknown_argument_is_named() -> None:
    """`signature().bind_partial` names only the first."""
    found = check_arguments(Demo, {"heads": 1, "one": 1, "two": 2}, "x", supplied=set())
    assert [problem.key for problem in found] == ["x.one", "x.two"]


def test_what_the_run_supplies_is_neither_missing_nor_allowed() -> None:
    assert check_arguments(Demo, {}, "x", supplied={"heads"}) == []
    [problem] = check_arguments(Demo, {"heads": 1}, "x", supplied={"heads"})
    assert "set by the run itself" in problem.text
    assert any("group callbacks" in problem for problem in problems("+trainer.callbacks=[]"))


@pytest.mark.parametrize(
    ("value", "annotation", "good"),
    [
        (1, float, True),
        (1.0, int, False),
        (True, float, False),
        ("a", str | None, True),
        (["a"], list[str], True),
        (["a", 1], list[str], False),
        ("a", list[str], False),
        ("a", Sequence[str], True),
        ([0.9, 0.99], tuple[float, float], True),
        ([0.9], tuple[float, float], False),
        ({"a": 1}, dict[str, int], True),
        (5, "unknown", True),
        (5, Any, True),
    ],
)
def test_values_fit_annotations(value: Any, annotation: Any, good: bool) -> None:
    assert fits(value, annotation) is good
