"""What a run settles before it trains, and leaves behind."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig, OmegaConf

from nanochat import params
from nanochat.config.compose import compose
from nanochat.errors import UserError
from nanochat.objectives.linear_cross_entropy import _Chunk
from nanochat.run import settle, train
from nanochat.training.module import NanoChatModule
from nanochat.training.resume import anchor_paths, check_resume
from tests.runs import configure, read_state, write_text

TOKENS = 2 * 32  # of a micro-batch
ONE_STEP = ["trainer.max_steps=1", "~callbacks.sampler", "~callbacks.loss_plot", "~callbacks.progress"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


# ---- vocabulary -----------------------------------------------------------------------------------------------------


def test_the_vocabulary_of_a_run_is_in_its_configuration(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(configure(place, [*ONE_STEP, "tokenizer=bpe", "model.vocab_size=270"]), place / "follows")
    saved = yaml.safe_load((place / "follows" / "config.yaml").read_text())
    assert (saved["model"]["vocab_size"], saved["tokenizer"]["vocab_size"]) == (270, 270)
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("size", ["5000", "auto"])
def test_a_text_that_is_too_small_warns_once(place: Path, size: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whether its tokenizer is trained now or was before; and such a run can be resumed."""
    settings = [*ONE_STEP, "tokenizer=bpe", f"model.vocab_size={size}"]
    for attempt in ("first", "second"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            train(configure(place, settings), place / size / attempt)
        [warning] = [record.getMessage() for record in caplog.records]
        got = json.loads((place / size / attempt / "model.json").read_text())["vocab_size"] if size == "auto" else None
        asked = 4096 if size == "auto" else 5000
        assert f"tokenizer.vocab_size={asked}: its tokenizer has {got or ''}" in warning
    saved = yaml.safe_load((place / size / "second" / "config.yaml").read_text())
    sizes = [f"{group}.vocab_size={saved[group]['vocab_size']}" for group in ("model", "tokenizer")]
    resumed = [*ONE_STEP, "tokenizer=bpe", *sizes, "ckpt_path=last", "trainer.max_steps=2"]
    assert train(configure(place, resumed), place / size / "second")["val/bpb"] > 0


def test_a_smaller_tokenizer_of_ones_own_warns(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(configure(place, [*ONE_STEP, "model.vocab_size=300"]), place / "smaller")
    [warning] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "has 257 of the model's 300 tokens" in warning


@pytest.mark.parametrize(
    ("overrides", "rows"), [([], 4096), (["tokenizer=byte"], 257), (["tokenizer=gpt2"], 50257)], ids=str
)
def test_params_of_a_model_as_large_as_its_tokenizer(overrides: list[str], rows: int, capsys) -> None:
    """Before any text is read."""
    assert params.main(["--json", "model.vocab_size=auto", *overrides]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["parts"]["embedding"] == rows * compose()["model"]["dim"]


# ---- loss.chunk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunk", "expected"), [("7", {7, TOKENS % 7}), ("null", {TOKENS})])
def test_training_and_validation_hold_as_many_logits(
    place: Path, chunk: str, expected: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[bool, set[int]] = {True: set(), False: set()}
    original = _Chunk.__init__

    def count(self: Any, logits: torch.Tensor, *args: Any) -> None:
        sizes[validating].add(logits.shape[0])
        original(self, logits, *args)

    step, validating = NanoChatModule.validation_step, False

    def validation_step(self: NanoChatModule, *args: Any) -> None:
        nonlocal validating
        validating = True
        step(self, *args)
        validating = False

    monkeypatch.setattr(_Chunk, "__init__", count)
    monkeypatch.setattr(NanoChatModule, "validation_step", validation_step)
    settings = [*ONE_STEP, f"loss.chunk={chunk}", "data.val_tokens=64"]
    train(configure(place, settings), place / f"chunk-{chunk}")
    assert sizes == {False: expected, True: expected}


# ---- loggers --------------------------------------------------------------------------------------------------------


class WandbLogger(Logger):
    """Named as the real one is; cannot be closed."""

    name, version = "wandb", "0"

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    @property
    def experiment(self) -> Any:
        def finish() -> None:
            raise OSError("the network\nis gone")

        return SimpleNamespace(finish=finish)


@pytest.mark.parametrize("fails", [True, False])
def test_a_logger_that_cannot_be_closed_hides_nothing(
    place: Path, fails: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def validation_step(self: NanoChatModule, *args: Any) -> None:
        raise ZeroDivisionError("the run's own")

    monkeypatch.setattr("nanochat.run.build_loggers", lambda plain, folder: [WandbLogger(), WandbLogger()])
    if fails:
        monkeypatch.setattr(NanoChatModule, "validation_step", validation_step)
        with pytest.raises(ZeroDivisionError, match="the run's own"):
            train(configure(place, ONE_STEP), place / "unlucky")
    else:
        assert train(configure(place, ONE_STEP), place / "lucky")["val/bpb"] > 0
    assert caplog.text.count("could not be closed (OSError: the network is gone)") == 2


# ---- paths ----------------------------------------------------------------------------------------------------------


def test_a_run_is_resumed_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here, elsewhere = tmp_path / "here [1]", tmp_path / "elsewhere"
    write_text(here / "text")
    write_text(here / "val", 3)
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    relative = ["data.paths=['text/00?.txt',text/011.txt,./text]", "data.val_paths=val", "data.cache_dir=cache"]
    train(configure(tmp_path, [*ONE_STEP, *relative]), Path("run").absolute())

    monkeypatch.chdir(elsewhere)
    cfg = OmegaConf.load(here / "run" / "config.yaml")
    assert isinstance(cfg, DictConfig)
    cfg.ckpt_path, cfg.trainer.max_steps = "last", 2
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert train(cfg, here / "run")["val/bpb"] > 0
    assert read_state(here / "run")["global_step"] == 2
    assert "Preparing" not in caplog.text  # what was prepared is found again
    assert list(elsewhere.iterdir()) == []


def test_paths_are_compared_as_what_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of an older version, whose checkpoint has relative paths, is resumed from the folder it was started in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    write_text(tmp_path / "text")
    own = {"_target_": "nanochat.data.tokenizer.GPT2", "path": "merges.txt"}
    train(configure(tmp_path, ONE_STEP), tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    plain = content["hyper_parameters"]["cfg"]
    torch.save({**content, "hyper_parameters": {"cfg": {**plain, "tokenizer": own}}}, tmp_path / "old.ckpt")
    check_resume(tmp_path / "old.ckpt", settle({**plain, "tokenizer": own}))
    with pytest.raises(UserError, match=r"tokenizer\.path .*/merges\.txt -> .*/other\.txt"):
        check_resume(tmp_path / "old.ckpt", settle({**plain, "tokenizer": {**own, "path": "other.txt"}}))


def test_a_reference_is_the_run_that_latest_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first checkpoint on, a run is itself outputs/latest."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "first").mkdir(parents=True)
    (tmp_path / "outputs" / "latest").symlink_to("first")
    plain = anchor_paths({"collider": {"reference": "outputs/latest", "cache": "~/scores"}, "mtp": None})
    assert plain["collider"] == {"reference": str(tmp_path / "outputs" / "first"), "cache": "~/scores"}
