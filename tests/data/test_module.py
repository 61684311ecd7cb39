"""The DataModule: arguments, batches under Lightning, and a position that survives."""

import gzip
import json
import os
import threading

import lightning
import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from nanochat.config.compose import compose
from nanochat.data import DataModule
from nanochat.data.cli import main
from nanochat.data.dataset import IGNORED
from nanochat.data.tokenizer import BPE, Byte
from nanochat.errors import ConfigError, UserError

from .conftest import make_text


@pytest.fixture
def make(corpus_dir, cache):
    def build(**options) -> DataModule:
        defaults = {"corpus": "text", "paths": [str(corpus_dir)], "tokenizer": Byte(), "seq_len": 16, "batch_size": 4}
        return DataModule(**{**defaults, "cache_dir": str(cache), **options})

    return build


class Recorder(lightning.LightningModule):
    """Learns nothing, remembers its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches: list[torch.Tensor] = []
        self.validated: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch["tokens"])
        self.trainer.datamodule.consumed += 1
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch["targets"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data: DataModule, steps: int, ckpt_path=None, **options) -> tuple[lightning.Trainer, Recorder]:
    module = Recorder()
    trainer = lightning.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer, module


def reference(data: DataModule, start: int, count: int) -> list[torch.Tensor]:
    return [data.train_dataloader().batches.batch(i)["tokens"] for i in range(start, start + count)]


def test_training_under_lightning_with_accumulation(make):
    data = make()
    trainer, module = fit(data, 7, accumulate_grad_batches=3, val_check_interval=6)
    assert trainer.global_step == 7
    assert data.consumed == len(module.batches) == 21
    for ours, theirs in zip(module.batches, reference(data, 0, 21), strict=True):
        assert torch.equal(ours, theirs)
    assert len(module.validated) == 3 * len(data.val_dataloader())
    assert trainer.train_dataloader is data.train_dataloader()
    assert trainer.train_dataloader.wait_seconds > 0
    assert not [t for t in threading.enumerate() if t.name == "nanochat-prefetch"]


def test_a_resumed_run_sees_the_rest_of_the_same_batches(make, tmp_path):
    path = tmp_path / "a.ckpt"
    trainer, _ = fit(make(), 4, accumulate_grad_batches=3, val_check_interval=5)
    trainer.save_checkpoint(path)
    data = make()
    trainer, module = fit(data, 9, path, accumulate_grad_batches=3, val_check_interval=5)
    assert (trainer.global_step, data.consumed) == (9, 27)
    for ours, theirs in zip(module.batches, reference(make_prepared(make), 12, 15), strict=True):
        assert torch.equal(ours, theirs)


def make_prepared(make, **options) -> DataModule:
    data = make(**options)
    data.setup()
    return data


def test_batches_from_a_position_are_the_tail_of_the_sequence(make):
    data = make_prepared(make)
    iterator = iter(data.train_dataloader())
    whole = [next(iterator) for _ in range(30)]
    for consumed in (0, 1, 17):
        resumed = make()
        resumed.load_state_dict({**data.state_dict(), "consumed": consumed})
        resumed.setup()
        iterator = iter(resumed.train_dataloader())
        for expected in whole[consumed:]:
            batch = next(iterator)
            assert torch.equal(batch["tokens"], expected["tokens"])
            assert torch.equal(batch["targets"], expected["targets"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, r"data\.seed=1 \(it was 0\)"),
        ({"batch_size": 5}, r"data\.batch_size=5 \(it was 4\)"),
        ({"seq_len": 8, "batch_size": 2}, r"data\.seq_len=8 \(it was 16\), data\.batch_size=2 \(it was 4\)"),
        ({"tokenizer": BPE(300)}, "the text or its tokenizer"),
        ({"corpus": "synthetic", "paths": None, "vocab_size": 50}, "the text or its tokenizer"),
    ],
)
@pytest.mark.parametrize("prepared", [True, False])
def test_a_position_in_other_data_is_refused(make, change, words, prepared):
    state = make_prepared(make).state_dict()
    assert json.loads(json.dumps(state)) == state
    data = make(**change)
    if prepared:
        data.setup()
    with pytest.raises(UserError, match=words):
        (data.load_state_dict(state), data.setup("fit"))


@pytest.mark.parametrize("state", [{}, {"consumed": -1}, {"consumed": "3"}, {"consumed": 1.5}, None])
def test_a_position_that_is_none(make, state):
    with pytest.raises(UserError, match="position"):
        make().load_state_dict(state)


def test_a_position_holds_after_the_files_were_touched(make, corpus_dir):
    state = {**make_prepared(make).state_dict(), "consumed": 3}
    os.utime(corpus_dir / "part0" / "file0.txt", ns=(1, 1))
    data = make_prepared(make)
    data.load_state_dict(state)
    assert data.consumed == 3


# ---- what it says about itself --------------------------------------------------------------------------------------


@pytest.mark.parametrize("val_tokens", [None, 100, 10**9])
def test_numbers_of_the_validation(make, val_tokens):
    data = make_prepared(make, val_tokens=val_tokens, tokenizer=BPE(300))
    shards = data._shards
    targets = torch.cat([batch["targets"].flatten() for batch in data.val_dataloader()])
    targets = targets[targets != IGNORED]
    assert len(targets) == min(val_tokens or 10**9, len(shards.val.tokens) - 1)
    table = data.token_bytes()
    assert data.val_bytes == table[targets.numpy()].sum()
    assert data.bytes_per_token == data.val_bytes / len(targets)
    if val_tokens != 100:
        assert data.val_bytes == shards.val.bytes == data.header["splits"]["val"]["bytes"]
    assert set(data.compression) == {"gzip -9", "xz -9e"}
    assert 0.5 < data.compression["gzip -9"] < 16
    text = data.tokenizer.decode([i for i in targets.tolist() if i != data.eot_id]).encode()
    if val_tokens == 100:
        assert data.compression["gzip -9"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert len(text) >= data.val_bytes
    assert data.train_tokens == len(shards.train.tokens)
    assert data.vocab_size == 300
    assert f"{data.train_tokens:,} tokens to train on" in data.describe()
    assert "\n" not in data.describe()


def test_synthetic_has_no_text(make):
    data = make_prepared(make, corpus="synthetic", paths=None, vocab_size=500, val_tokens=100)
    assert (data.vocab_size, data.train_tokens, data.val_bytes, data.bytes_per_token) == (500, None, None, None)
    assert data.token_bytes() is data.eot_id is data.tokenizer.token_bytes() is None
    assert data.compression == {}
    assert "synthetic" in data.describe()
    batch = next(iter(data.train_dataloader()))
    assert batch["tokens"].shape == (4, 16)
    validation = list(data.val_dataloader())
    assert len(validation) == len(data.val_dataloader()) == 2
    assert not any(torch.equal(row, other) for row in batch["tokens"] for other in validation[0]["tokens"])
    state = {**data.state_dict(), "consumed": 2}
    data.load_state_dict(state)
    assert make_prepared(make, corpus="synthetic", paths=None).vocab_size == 257
    _, module = fit(make(corpus="synthetic", paths=None, vocab_size=500), 3, val_check_interval=2)
    assert len(module.batches) == 3


def test_paths_take_the_place_of_the_standard_library(make, corpus_dir):
    ours, text = make_prepared(make, corpus="stdlib"), make_prepared(make)
    assert ours.state_dict() == text.state_dict()
    assert ours.describe().startswith("text: ")
    assert isinstance(make_prepared(make, paths=str(corpus_dir)), DataModule)


def test_jsonl_and_code(make, tmp_path):
    folder = tmp_path / "more"
    folder.mkdir()
    with open(folder / "a.jsonl", "w") as file:
        file.writelines(json.dumps({"content": make_text(i, 5)}) + "\n" for i in range(80))
    (folder / "a.py").write_text("x = 1\n" * 100)
    (folder / "a.rs").write_text("fn main() {}\n" * 100)
    (folder / "notes.txt").write_text("notes\n" * 100)
    lines = make_prepared(make, corpus="jsonl", paths=[str(folder / "a.jsonl")], text_key="content")
    assert sum(split["documents"] for split in lines.header["splits"].values()) == 80
    with pytest.raises(UserError, match=r"data\.text_key=text"):
        make_prepared(make, corpus="jsonl", paths=[str(folder / "a.jsonl")])
    for extensions, size in (([".rs"], 13 * 100), (None, 19 * 100)):
        code = make_prepared(make, corpus="code", paths=[str(folder)], extensions=extensions)
        used = code.header["splits"]["train"]["bytes"] + code.header["splits"]["val"]["bytes"]
        assert 0.97 * size < used < size  # the rest is the gap between the splits
        assert f"({code.header['share']:.1%} of the text)" in code.describe()


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD = {
    "corpus": ["stdlb", "", None],
    "seq_len": [0, -1, 1.5, "8", True, None],
    "batch_size": [0, -3, "x", None],
    "val_batch_size": [0, -1, "x"],
    "val_tokens": [0, -1, 0.5],
    "max_file_bytes": [0, -1, "1MB"],
    "seed": [-1, 1.0, None],
    "prefetch": [0, -1],
    "cache_dir": ["", " "],
    "text_key": [3],
    "extensions": [[], [3], [""]],
    "paths": [[], None, [3], [""], ["no/such/file"], "no/such/file"],
    "val_paths": [["no/such/file"], [3]],
    "tokenizer": [{"vocab_size": 3}, "bpe"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_arguments_are_named(make, name, value):
    with pytest.raises(ConfigError, match=rf"^data\.{name}\b") as error:
        make(**{name: value})
    assert len(error.value.problems) == 1


def test_all_problems_at_once(make):
    with pytest.raises(ConfigError) as error:
        make(seq_len=0, batch_size=-1, paths=["no/such/file"])
    assert len(error.value.problems) == 3


@pytest.mark.parametrize("vocabulary", [0, 1, -5, "large", 2.5, None])
def test_bad_synthetic_vocabularies(make, vocabulary):
    with pytest.raises(ConfigError, match=r"data\.vocab_size="):
        make(corpus="synthetic", paths=None, vocab_size=vocabulary)
    with pytest.raises(ConfigError, match="no use with data=synthetic"):
        make(corpus="synthetic", vocab_size=5)


@pytest.mark.parametrize("text", ["x", "xy", "x\n" * 8])
def test_too_little_text(make, tmp_path, text):
    (tmp_path / "small.txt").write_text(text)
    with pytest.raises(UserError, match=r"too few for one sequence of 16 .*data\.seq_len|no two tokens|no text"):
        make_prepared(make, paths=[str(tmp_path / "small.txt")], tokenizer=Byte())


def test_one_file_of_one_window(make, tmp_path):
    (tmp_path / "small.txt").write_text("x" * 40)
    data = make_prepared(make, paths=[str(tmp_path / "small.txt")])
    assert next(iter(data.train_dataloader()))["tokens"].shape == (4, 16)


def test_nothing_is_written_before_preparing(make, cache):
    make()
    assert not cache.exists()


def test_instantiated_as_a_run_does(corpus_dir, cache):
    node = {"_target_": "nanochat.data.module.DataModule", "corpus": "text", "paths": [str(corpus_dir)]}
    spec = instantiate({"_target_": "nanochat.data.tokenizer.BPE", "vocab_size": 300})
    data = instantiate({**node, "cache_dir": str(cache)}, tokenizer=spec)
    data.setup()
    assert data.vocab_size == 300
    again = instantiate({**node, "cache_dir": str(cache)}, tokenizer=data.tokenizer)
    again.setup()
    assert np.array_equal(again._shards.train.tokens, data._shards.train.tokens)


@pytest.mark.parametrize(
    ("option", "tokenizer"),
    [("stdlib", "byte"), ("text", "gpt2"), ("code", "bpe"), ("jsonl", "byte"), ("synthetic", "bpe")],
)
def test_every_option_composes_and_is_possible(option, tokenizer, tmp_path):
    paths = [] if option in ("stdlib", "synthetic") else [f"data.paths=[{tmp_path}]"]
    cfg = compose([f"data={option}", f"tokenizer={tokenizer}", "callbacks=none", *paths])
    assert cfg["data"]["corpus"] == option
    assert isinstance(instantiate(cfg["data"], tokenizer=instantiate(cfg["tokenizer"])), DataModule)


def test_the_command_line_prepares_and_describes(corpus_dir, cache, capsys):
    (corpus_dir / "latin.txt").write_bytes(b"\xe4")
    words = ["data=text", f"data.paths=[{corpus_dir}]", f"data.cache_dir={cache}", "tokenizer=byte", "callbacks=none"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.startswith("text: ")
    assert "gzip -9 " in said
    assert "skipped latin.txt: not UTF-8" in said
    assert main([*words, "--json"]) == 0
    header = json.loads(capsys.readouterr().out)
    assert header["splits"]["train"]["tokens"] > 1000
    assert os.path.isfile(os.path.join(header["folder"], "train.bin"))
    assert main(["data=synthetic", "callbacks=none"]) == 0
