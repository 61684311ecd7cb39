"""Rules between the fields of a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from nanochat.config import rules
from nanochat.config.check import check
from nanochat.config.compose import compose
from nanochat.errors import ConfigError
from tests.config.helpers import problems


@pytest.fixture(scope="module")
def default() -> DictConfig:
    """The configuration of `python train.py`, composed once."""
    return OmegaConf.create(compose())


def problems_of_values(default: DictConfig, *overrides: str) -> list[str]:
    """As `problems`, for changed values alone and without Hydra, which takes most of the time."""
    try:
        check(OmegaConf.merge(default, OmegaConf.from_dotlist(list(overrides))))
    except ConfigError as error:
        return error.problems
    return []


STOPPING = ["callbacks.stop._target_=nanochat.training.callbacks.early_stopping.EarlyStopping"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.n_heads=3", "model.n_kv_heads=1"], ["model.dim=256", "model.n_heads=3"]),
        (["model.n_kv_heads=3"], ["model.n_heads=4", "model.n_kv_heads=3"]),
        (["model.dim=12"], ["must be even"]),
        (["model.dim=abc"], ["model.dim=abc", "a whole number"]),
        (["model.dim=-8"], ["model.dim=-8", "at least 1"]),
        (["model.n_layers=0"], ["model.n_layers=0", "at least 1"]),
        (["model.activation=gelu"], ["gelu", "silu"]),
        (["data.seq_len=300"], ["data.seq_len=300", "model.seq_len=256"]),
        (["tokenizer.vocab_size=5000"], ["tokenizer.vocab_size=5000", "model.vocab_size=4096"]),
        (["tokenizer.vocab_size=auto", "model.vocab_size=64"], ["model.vocab_size=64", "at least 257"]),
        (["data.batch_size=0"], ["data.batch_size=0", "at least 1"]),
        (["data.seq_len=-1"], ["data.seq_len=-1", "at least 1"]),
        (["trainer.max_steps=0"], ["trainer.max_steps=0", "at least 1"]),
        (["trainer.max_steps=1.5"], ["trainer.max_steps=1.5", "a whole number"]),
        (["trainer.accumulate_grad_batches=0"], ["accumulate_grad_batches=0", "at least 1"]),
        (["trainer.gradient_clip_val=-1"], ["gradient_clip_val=-1", "negative"]),
        (["trainer.val_check_interval=0"], ["val_check_interval=0"]),
        (["trainer.devices=0"], ["trainer.devices=0"]),
        (["trainer.max_time=soon"], ["trainer.max_time=soon", "DD:HH:MM:SS"]),
        (["trainer.accelerator=gpu0"], ["gpu0", "did you mean 'gpu'"]),
        (
            ["trainer.precision=16-mixed"],
            ["16-mixed", "gradients that are not scaled", "use bf16-mixed, 32-true or auto"],
        ),
        (["trainer.precision=transformer-engine"], ["needs the package transformer_engine"]),
        (["trainer.precision=fp16"], ["trainer.precision=fp16", "one of"]),
        (["optim.lr=-0.1"], ["optim.lr=-0.1", "negative"]),
        (["optim.lr=high"], ["optim.lr=high", "a number"]),
        (["schedule.floor=2"], ["schedule.floor=2"]),
        (["loss.z_loss=-1"], ["loss.z_loss=-1"]),
        (["loss.zloss=1"], ["loss.zloss", "did you mean 'z_loss'"]),
        (["callbacks.checkpoint.every_n_train_steps=0"], ["every_n_train_steps=0", "at least 1"]),
        ([*STOPPING, "callbacks.stop.patience=0"], ["early_stopping.patience=0", "at least 1"]),
        ([*STOPPING, "callbacks.stop.patience=soon"], ["callbacks.stop.patience=soon", "a whole number"]),
        ([*STOPPING, "callbacks.stop.min_delta=-1"], ["early_stopping.min_delta=-1", "at least 0"]),
        ([*STOPPING, "callbacks.stop.monitor=val/los"], ["callbacks.stop.monitor=val/los", "one of val/bpb, val/loss"]),
        ([*STOPPING, "trainer.limit_val_batches=0"], ["callbacks.stop", "limit_val_batches=0"]),
        (["seed=-1"], ["seed=-1"]),
        (["seed=abc"], ["seed=abc"]),
        (["seed=${nope}"], ["seed cannot be resolved", "nope"]),
        (["task_name=a/b"], ["task_name='a/b'"]),
        (["tags=abc"], ["tags='abc'"]),
        (["compile=maybe"], ["compile=maybe"]),
        (["weights=bfloat"], ["weights=bfloat is unknown", "did you mean 'bfloat16'"]),
        (["rank_timeout=0"], ["rank_timeout=0 must be a length of time above 0, such as 8h, 90m"]),
        (["offload_optimizer=cpu"], ["offload_optimizer=cpu must be true or false"]),
        (["activation_checkpointing=blocks"], ["activation_checkpointing=blocks is unknown", "did you mean 'block'"]),
        (["ckpt_path=lst"], ["ckpt_path=lst", "did you mean 'last'"]),
        (["logger.x=5"], ["logger.x has no _target_"]),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] else "",
)
def test_what_cannot_be_is_refused(overrides: list[str], words: list[str], default: DictConfig) -> None:
    found = problems_of_values(default, *overrides)
    assert any(all(word in problem for word in words) for problem in found), found
    keys = [problem.split("=")[0] for problem in found if "=" in problem]
    assert len(keys) == len(set(keys)), f"said twice: {found}"


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.vocab_size=auto", "tokenizer.vocab_size=9000"],
        ["tokenizer.vocab_size=4096", "model.vocab_size=600", "ckpt_path=last"],  # the text gave no more than 600
        ["trainer.max_time=00:00:10:00"],
        ["trainer.gradient_clip_val=null"],
        ["ckpt_path=last"],
        ["ckpt_path=auto"],
        ["tags=[a,b]"],
        ["compile=false"],
        ["activation_checkpointing=every_other"],
        ["seed=7", "task_name=my-run"],
    ],
    ids=lambda value: " ".join(value),
)
def test_what_can_be_is_accepted(overrides: list[str], default: DictConfig) -> None:
    assert problems_of_values(default, *overrides) == []


def test_the_tokenizer_is_as_large_as_the_model() -> None:
    def size(*overrides: str) -> int:
        return compose(overrides)["tokenizer"]["vocab_size"]

    assert size() == 4096
    assert size("model=d20") == 50257
    assert size("experiment=d20", "debug=fdr") == 4096  # which takes another model
    assert size("model=d20", "model.vocab_size=auto") == 4096
    assert size("model=d20", "tokenizer.vocab_size=300") == 300
    assert compose(["experiment=d20", "tokenizer=byte"])["tokenizer"] == {"_target_": "nanochat.data.tokenizer.Byte"}
    assert problems("data=synthetic", "model.vocab_size=64") == []


def test_early_stopping_where_there_is_no_text() -> None:
    [problem] = problems("callbacks=early_stopping", "data=synthetic")
    assert "callbacks.early_stopping.monitor=val/bpb needs text" in problem
    good = ["data=synthetic", "callbacks.early_stopping.monitor=val/loss", "callbacks.early_stopping.min_delta=1"]
    assert problems("callbacks=early_stopping", *good) == []


def test_a_warmup_is_refused_only_where_the_user_set_it() -> None:
    assert problems("trainer.max_steps=10") == []
    [problem] = problems("schedule.warmup_steps=20", "trainer.max_steps=10")
    assert "schedule.warmup_steps=20" in problem
    assert "trainer.max_steps=10" in problem


def test_a_device_that_is_not_there(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    [problem] = problems("trainer=gpu")
    assert "no such device" in problem
    assert "trainer=cpu" in problem


def test_wandb_needs_its_package_and_an_account(monkeypatch, tmp_path: Path) -> None:
    find_spec = rules.importlib.util.find_spec
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    [problem] = problems("logger=wandb")
    assert "nanochat[wandb]" in problem
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: name == "wandb" or find_spec(name))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    [problem] = problems("logger=wandb")
    assert "logger.wandb.offline=true" in problem
    assert problems("logger=wandb", "logger.wandb.offline=true") == []
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x")
    assert problems("logger=wandb") == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["+mpt=on", "optim=mun", "data.batch_sise=2", "seed=-1", "trainer.max_steps=0"],
        ["model.n_heads=3", "+optim.momentun=1", "+trainer.callbacks=[]", "loss.z_loss=-1"],
    ],
    ids=["without torch", "with torch"],
)
def test_all_problems_are_reported_at_once(overrides: list[str]) -> None:
    """Those that need torch to be found only once there are no others."""
    found = problems(*overrides)
    for word in (override.lstrip("+").partition("=")[0] for override in overrides):
        assert any(word in problem for problem in found), (word, found)


def test_check_needs_no_hydra() -> None:
    check(OmegaConf.create(compose(["trainer.max_steps=10"])))
    with pytest.raises(ConfigError, match="did you mean 'trainer'"):
        check(OmegaConf.create({**compose(), "trainr": {}}))
