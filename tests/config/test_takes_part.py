"""What is given on the command line takes part in the run, or is refused by the name that was given."""

from __future__ import annotations

import math

import pytest
from omegaconf import DictConfig, OmegaConf

from nanochat.config.check import check
from nanochat.config.compose import compose
from nanochat.config.overrides import Overrides
from nanochat.errors import ConfigError
from tests.config.helpers import problems

LANE = ("value_embedding_layers=[0]", "value_embedding_width=128", "value_gain=1", "value_embedding_std=0.1")


@pytest.mark.parametrize(
    ("overrides", "idle"),
    [
        (["model.value_gate=input", *(f"model.{given}" for given in LANE)], 5),  # there is no table
        (["model.value_embeddings=1", "model.value_gate=input", "model.value_gain=1.0"], 1),
        (["model.head_std=0.1", "model.stream_maps=dynamic", "model.qk_norm=false", "model.qk_gain=1.3"], 3),
        (["optim.groups.value_embedding.eps=1e-9", "optim.hyper_lr=0.1", "optim.head_lr=0.1"], 3),
        (["model.tied=false", "optim=lion", "optim.tied_lr=0.1", "optim.value_embedding_lr=0.1"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_has_no_effect_in_this_network_is_refused(overrides: list[str], idle: int) -> None:
    found = problems(*overrides)
    keys = [problem.partition(" takes no part in the run")[0] for problem in found]
    given = [override.partition("=")[0] for override in overrides]
    assert len(found) == idle
    assert set(keys) <= set(given)


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=tiny", "optim.value_embedding_lr=0.1", "optim.head_lr=0.1", *(f"model.{given}" for given in LANE)],
        ["model.value_embeddings=1", "model.value_gate=input", "optim.groups.value_gate.weight_decay=0.1"],
        ["+mhc=on", "optim.hyper_lr=0.1", "mhc.maps=dynamic"],
        ["optim.tied_lr=0.1", "optim.groups.scalars.eps=1e-9"],
    ],
    ids=" ".join,
)
def test_what_has_an_effect_is_accepted(overrides: list[str]) -> None:
    assert problems(*overrides) == []


def test_a_value_that_replaces_a_features_is_the_one_that_is_named() -> None:
    [problem] = problems("+mhc=on", "model.streams=3")
    assert problem.startswith("model.streams is given, so that mhc.streams=2")
    [problem] = problems("+mhc=on", "mhc.maps=static", "model.stream_maps=dynamic")
    assert problem.startswith("mhc.maps takes no part")  # both were given
    [problem] = problems("model.streams=3")
    assert problem.startswith("model.streams=3 (mhc.streams sets it) must be 2 or 4")


def test_a_number_is_finite() -> None:
    keys = ["optim.lr", "optim.scalar_lr", "optim.groups.scalars.eps", "loss.z_loss", "model.rope_base", "seed"]
    keys += ["schedule.floor", "trainer.gradient_clip_val"]
    found = problems(*(f"{key}={value}" for key, value in zip(keys, ["nan", "inf", "-inf"] * 3, strict=False)))
    assert {"optim.lr=nan is not a finite number.", "optim.groups.scalars.eps=-inf is not a finite number."} <= {*found}
    assert all(any(problem.startswith(f"{key}=") for problem in found) for key in keys)
    assert not any("negative" in problem for problem in found)


def test_a_users_own_callback_may_have_an_infinite_value() -> None:
    def configure(value: float) -> DictConfig:
        own = {"_target_": "tests.config.helpers.Demo", "heads": 1, "scale": value}
        return OmegaConf.create({**default, "callbacks": {"own": own}})

    default = compose()
    check(configure(math.inf))
    with pytest.raises(ConfigError, match=r"^callbacks.own.scale=nan is not a finite number.$"):
        check(configure(math.nan))


@pytest.mark.parametrize(
    ("override", "remedy"),
    [("logger=[none,csv]", "write logger=[csv], or logger=none."), ("callbacks=[default,none]", "callbacks=[default]")],
)
def test_none_of_a_group_stands_alone(override: str, remedy: str) -> None:
    [problem] = Overrides([override]).check()
    assert problem.startswith(f"{override}: none does not go with others")
    assert remedy in problem


def test_several_loggers_are_one_group() -> None:
    assert Overrides(["logger=[csv,tensorboard]"]).check() == []
