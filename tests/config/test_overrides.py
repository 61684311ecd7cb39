"""Every mistake of a command line is found, Hydra's own traps among them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from nanochat.config.compose import compose
from tests.config.helpers import problems


@pytest.fixture
def own_files(tmp_path: Path) -> str:
    """A user's own folder of options, as an override: a feature `demo`, and an experiment that tunes it."""
    files = {
        "demo/on.yaml": "_target_: tests.config.helpers.Demo\nheads: 2\n",
        "demo/off.yaml": "# nothing\n",
        "experiment/with_demo.yaml": '# @package _global_\ndefaults:\n  - /demo: "on"\n  - override /model: tiny\n'
        "demo:\n  heads: 4\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return f"hydra.searchpath=[file://{tmp_path}]"


def test_a_feature_is_added_with_a_plus(own_files: str) -> None:
    assert compose([own_files, "+demo=on"])["demo"]["heads"] == 2
    assert compose([own_files, "+demo=on", "demo.heads=3"])["demo"]["heads"] == 3
    assert compose([own_files, "+demo=off"])["demo"] == {}
    assert "demo" not in compose([own_files])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+mpt=on"], ["mpt", "did you mean 'mtp'"]),  # Hydra adds the string and trains without it
        (["mtp=on"], ["mtp=on", "write +mtp=on"]),
        (["+collider=on", "collider.sparsity=1"], ["collider.sparsity=1 must lie in [0, 1)"]),
        (["+collider=on", "collider.score=excess"], ["collider.reference=RUN belong together"]),
        (["+collider=on", "collider.score=foo"], ["collider.score='foo' is unknown"]),
        (["+collider=on", "collider.warmup_steps=-1"], ["collider.warmup_steps=-1 must be"]),
        (["+collider=on", "collider.cache=x"], ["collider.cache holds"]),
        (["+mtp=on", "mtp.tokens=40", "data.seq_len=32"], ["mtp.tokens=40 looks beyond", "at most 31"]),
        (["optim=adamw", "optim.betas=[0.9]"], ["optim.betas=[0.9] must be two numbers"]),
        (["optim.groups.hyper=5"], ["optim.groups.hyper=5 is not a group"]),
        (["optim=adamw", "optim.eps=0"], ["optim.eps=0 must be more than 0"]),
        (["++mtp=on"], ["write +mtp=on"]),
        (["+mtp=null"], ["+mtp=null", "+mtp=off"]),  # Hydra crashes with a TypeError
        (["+mtp=n"], ["mtp=n", "no option 'n'"]),
        (["+collider.sparsity=0.5"], ["collider.sparsity", "+collider=on"]),
        (["collider.sparsity=0.5"], ["collider.sparsity", "+collider=on"]),
        (["optim=mun"], ["optim=mun", "did you mean 'muon'"]),
        (["optm=muon"], ["optm=muon", "did you mean 'optim'"]),
        (["model.dmi=5"], ["model.dmi=5", "did you mean 'model.dim'"]),
        (["+model.dmi=5"], ["model.dmi", "did you mean 'dim'"]),
        (["++modle.dim=5"], ["modle", "did you mean 'model'"]),
        (["trainer.max_step=5"], ["did you mean 'trainer.max_steps'"]),
        (["+model.dim=5"], ["model.dim", "without the +"]),
        (["+callbacks.samplr.every=3"], ["callbacks.samplr", "did you mean 'sampler'"]),
        (["~callbacks.samplr"], ["callbacks.samplr", "did you mean 'callbacks.sampler'"]),
        (["experiment=tny"], ["did you mean 'tiny'"]),
        (["model=[d20,tiny]"], ["model=[d20,tiny]", "choose one"]),  # Hydra merges both
        (["x=="], ["'x=='", "cannot be read"]),
        (["model.dim"], ["'model.dim'", "cannot be read"]),
        (["hydra.searchpath=[file://no/such/folder]"], ["no/such/folder"]),
        (["model=null"], ["model=null", "name of one of its options"]),
        (["seed=???"], ["seed has no value yet"]),
        (["model=5"], ["model=5", "name of one of its options"]),
        (["~optim"], ["optim", "optim=OPTION"]),
        (["model=d20", "model.n_heads=3", "~data"], ["data is not chosen"]),
    ],
    ids=lambda value: " ".join(value) if (value and "=" in value[0]) or "~" in str(value[0]) else "",
)
def test_typos_are_found_with_a_suggestion(overrides: list[str], words: list[str]) -> None:
    found = problems(*overrides)
    assert any(all(word in problem for word in words) for problem in found), found
    assert all("\n" not in problem for problem in found)


def test_an_experiment_that_chooses_a_feature(own_files: str) -> None:
    assert compose([own_files, "experiment=with_demo"])["demo"] == {"_target_": "tests.config.helpers.Demo", "heads": 4}
    [problem] = problems(own_files, "experiment=with_demo", "+demo=on")
    assert "+demo=on: demo=on is chosen already; write demo=on without the +" in problem
    # the experiment's own values survive: on is who has a _target_, not whose key exists
    assert compose([own_files, "experiment=with_demo", "demo=off"])["demo"] == {"heads": 4}


def test_numbers_in_scientific_notation_are_numbers() -> None:
    """PyYAML alone reads 3e-4 as a text."""
    assert compose(["optim.lr=3e-4"])["optim"]["lr"] == 3e-4


def test_a_callback_is_removed_by_its_name() -> None:
    assert "sampler" in compose()["callbacks"]
    assert "sampler" not in compose(["~callbacks.sampler"])["callbacks"]
    assert compose(["callbacks=none"])["callbacks"] == {}


def test_a_feature_that_the_model_knows_of() -> None:
    assert compose()["model"]["streams"] == 1
    with_streams = OmegaConf.create({"model": {"streams": "${oc.select:mhc.streams,1}"}, "mhc": {"streams": 2}})
    assert with_streams.model.streams == 2


def test_composing_leaves_nothing_behind() -> None:
    before = HydraConfig.instance().cfg
    compose(["model=d20"])
    problems("model=d21")
    assert HydraConfig.instance().cfg is before
