"""Comparisons with other projects: with small stand-ins that have the calls of the real ones."""

import csv
import json
import math
import os

import pytest
import torch

import nanochat.cli
from nanochat import run
from nanochat.bench import equal_time, peers, step
from nanochat.errors import UserError
from tests.runs import words

SMALL = ["model.n_layers=1", "model.dim=64", "model.n_heads=2", "model.n_kv_heads=2", "model.ffn_dim=64"]
SHAPE = [*SMALL, "model.vocab_size=512", "model.seq_len=32"]

KARPATHY = """
import os, dataclasses, needed_package
import torch
print("chatter on stdout, which is no answer")

@dataclasses.dataclass
class GPTConfig:
    sequence_len: int; vocab_size: int; n_layer: int; n_head: int; n_kv_head: int; n_embd: int; window_pattern: str

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        if os.environ["NANOCHAT_DTYPE"] == "bfloat16":
            raise RuntimeError("no bfloat16 here")
        self.table = torch.nn.Embedding(config.vocab_size, config.n_embd)
    def init_weights(self):
        torch.nn.init.zeros_(self.table.weight)
    def setup_optimizer(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)
    def forward(self, tokens, targets):
        logits = self.table(tokens) @ self.table.weight.T
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
"""
LITGPT = """
import torch
class Config:
    def __init__(self, **fields):
        self.__dict__.update(fields)
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = torch.nn.Module()
        self.transformer.wte = torch.nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.lm_head = torch.nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
    def forward(self, tokens):
        return self.lm_head(self.transformer.wte(tokens))
"""
LITGPT_UTILS = """
import torch
def chunked_cross_entropy(logits, targets, chunk_size, ignore_index):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index)
"""


def write(folder, **files):
    """A package of some modules."""
    folder.mkdir(parents=True)
    for name, text in {"__init__": "", **files}.items():
        (folder / f"{name}.py").write_text(text)


@pytest.fixture
def clones(tmp_path):
    """`--peer` options of both stand-ins."""
    write(tmp_path / "karpathy" / "nanochat", gpt=KARPATHY)
    write(tmp_path / "extra" / "needed_package")
    write(tmp_path / "lit" / "litgpt", __init__=LITGPT, utils=LITGPT_UTILS)
    return {
        "karpathy": f"karpathy={tmp_path / 'karpathy'}{os.pathsep}{tmp_path / 'extra'}",
        "litgpt": f"litgpt={tmp_path / 'lit'}",
    }


def test_step(clones, capsys, monkeypatch):
    monkeypatch.setattr(peers, "times_slower", lambda dtype, device: 1.0)
    options = [f"--peer={value}" for value in clones.values()]
    assert step.main([*options, "--presets", "tiny", "--repeats", "1", "--json", *SHAPE]) == 0
    figures = json.loads(capsys.readouterr().out)["peers"]["tiny"]
    arms = figures["arms"]
    assert {"ours", "karpathy, float32, eager", "litgpt, float32, eager"} <= set(arms)
    assert figures["best"]["karpathy"] == "karpathy, float32, eager"
    assert figures["failed"]["karpathy, bfloat16, eager"] == "RuntimeError: no bfloat16 here"
    assert arms["karpathy, float32, eager"]["parameters"] == 512 * 64
    assert arms["litgpt, float32, eager"]["parameters"] == 512 * 64  # tied, as ours is
    assert figures["tokens_per_step"] == 6 * 32
    for arm in arms.values():  # one round: the ratio of the seconds is that of the speeds
        ratio = arms["ours"]["tokens_per_second"] / arm["tokens_per_second"]
        assert arm["ours_over_this"] == pytest.approx(ratio)


def test_table(clones, capsys, monkeypatch):
    monkeypatch.setattr(peers, "DTYPES", ("float32",))
    assert step.main([f"--peer={clones['litgpt']}", "--presets", "tiny", "--repeats", "1", *SHAPE]) == 0
    out = capsys.readouterr().out
    assert "192 tokens a step" in out
    assert "litgpt, float32, eager" in out
    assert "precision=32-true" in out or "precision=bf16-mixed" in out


def test_rounds_interleave(clones, monkeypatch):
    order = []
    one = peers.peer(clones["litgpt"])
    load = peers.current_load(step.model_config(step.configure("tiny", "muon", SHAPE)), 1, 1, torch.device("cpu"))
    monkeypatch.setattr(peers, "DTYPES", ("float32",))
    asked = peers.Arm.seconds
    monkeypatch.setattr(peers.Arm, "seconds", lambda self: order.append("peer") or asked(self))
    peers.compare(lambda: order.append("ours"), 1, [one], False, load, repeats=2)
    assert order == ["peer", "ours", "peer", "peer", "ours", "ours", "peer"]  # a first step, then turn by turn


def test_slow_arithmetic_is_left_out(clones, monkeypatch):
    one = peers.peer(clones["litgpt"])
    load = peers.current_load(step.model_config(step.configure("tiny", "muon", SHAPE)), 1, 1, torch.device("cpu"))
    monkeypatch.setattr(peers, "times_slower", lambda dtype, device: {"float32": 1.0, "bfloat16": 5.0}[dtype])
    with peers.open_arms([one], False, load) as (arms, failed):
        assert [arm.dtype for arm in arms] == ["float32"]
        assert failed == {"litgpt, bfloat16, eager": "a product takes 5 times as long as in float32"}


MISTAKES = {
    "--peer karpaty=.": "there is no peer 'karpaty'; did you mean 'karpathy'",
    "--peer karpathy": "must be karpathy=PATH",
    "--peer karpathy=/does/not/exist": "/does/not/exist is not a folder",
    "--peer litgpt=EMPTY": "EMPTY is not a clone of litgpt: it has no litgpt/__init__.py",
    "--peer karpathy=ALONE": "--peer karpathy=ALONE: it cannot be imported (No module named 'needed_package')",
    "--compile": "--compile is for the peers",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_one_sentence(words, clones, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "ALONE": str(tmp_path / "karpathy")}

    def fill(text):
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    argv = ["bench", "step", *fill(words).split(), "--presets", "tiny", "--repeats", "1", *SHAPE]
    assert nanochat.cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert fill(MISTAKES[words]) in err
    assert err.count("\n") == 1


def test_a_peer_that_dies(tmp_path):
    write(tmp_path / "nanochat", gpt="import os, sys\nprint('out of luck', file=sys.stderr, flush=True)\nos._exit(9)\n")
    one = peers.peer(f"karpathy={tmp_path}")
    load = peers.current_load(step.model_config(step.configure("tiny", "muon", SHAPE)), 1, 1, torch.device("cpu"))
    with (
        pytest.raises(UserError, match=r"no step of it ran \(its process died \(out of luck\)\)"),
        peers.open_arms([one], False, load),
    ):
        pass


def test_equal_time(clones, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers, "DTYPES", ("float32",))
    progress = []

    def train_and_look(checked, folder):
        metrics = run.train(checked, folder)
        with (folder / "metrics.csv").open(newline="") as file:
            progress.extend(float(row["train/progress"]) for row in csv.DictReader(file))
        return metrics

    monkeypatch.setattr(equal_time, "train", train_and_look)
    argv = [f"--peer={clones['karpathy']}", "--seconds", "1", "--json", *words(tmp_path)]
    assert equal_time.main(argv) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    ours, peer = runs["ours"], runs["karpathy"]
    assert ours["tokens"] == ours["steps"] * 2 * 32
    assert 0 < ours["seconds"] < 3
    assert len(progress) == ours["steps"]  # one row a step: nothing was validated within the time
    assert progress == sorted(progress)
    assert progress[0] < progress[-1] <= 1.0  # the schedule followed the clock
    assert peer["tokens"] == peer["steps"] * 2 * 32
    assert 1.0 <= peer["seconds"] < 3
    # the stand-in's logits are all zero: it knows nothing, whatever it sees
    assert peer["nats_per_token"] == pytest.approx(math.log(257), rel=1e-5)
    # both were validated on the same targets of as many bytes
    assert ours["nats_per_token"] / ours["bits_per_byte"] == pytest.approx(
        peer["nats_per_token"] / peer["bits_per_byte"], rel=1e-6
    )
    assert ours["nats_per_token"] < peer["nats_per_token"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.max_time='00:00:01:00'"], "--seconds for the time"),
        (["trainer.max_steps=5"], "--seconds for the time"),
        (["data=synthetic"], "needs a text"),
        (["model.n_layer=1"], "did you mean 'model.n_layers'"),
    ],
)
def test_equal_time_s_mistakes(overrides, said, clones):
    with pytest.raises(UserError, match=said):
        equal_time.main([f"--peer={clones['karpathy']}", "--seconds", "1", *overrides])


def test_equal_time_needs_a_peer():
    with pytest.raises(UserError, match="--peer"):
        equal_time.main(["--seconds", "1"])
