"""The benches run, and their figures have the meaning that their names promise."""

import json
import threading
import time
from functools import partial

import pytest
import torch

import nanochat.cli
from nanochat.bench import cli, loss, measure, save, step
from nanochat.errors import UserError
from nanochat.model import GPT
from nanochat.run import build_trainer
from nanochat.training.callbacks.checkpoint import Checkpoint
from nanochat.training.callbacks.guard import NonFiniteGuard
from nanochat.training.callbacks.loss_plot import LossPlot
from nanochat.training.callbacks.metrics import MetricsCSV
from nanochat.training.callbacks.sampler import TextSampler
from nanochat.training.callbacks.throughput import Throughput
from nanochat.training.module import NanoChatModule


def test_loss(capsys):
    assert loss.main(["--tokens", "1024", "--dim", "32", "--vocabulary", "2000", "--repeats", "1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    arms = figures["arms"]
    peaks = arms["chunked"]["peak_extra_mb"] / arms["dense"]["peak_extra_mb"]
    assert figures["memory_ratio"] == pytest.approx(peaks, rel=1e-12)  # of bytes and of megabytes: rounding apart
    assert figures["arms"]["dense"]["time_ratio"] == 1.0


def test_save(capsys):
    assert save.main(["--every", "2", "--batch", "1", "--repeats", "1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    # float32 weights and a momentum, or two, of each; the file has little besides
    assert 2 * 4 * 3.6 < figures["checkpoint_mb"] < 3.2 * 4 * 3.7
    assert figures["lowest_ratio_beside"] <= figures["step_ratio_beside"] <= figures["highest_ratio_beside"]
    assert figures["held_up_seconds"] > 0


def test_a_turn_of_saving_by_each_clock():
    """Work of another thread, and waiting in the midst of training, is not the training thread's; a save's wait is."""

    def work(seconds):
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    other = threading.Thread(target=work, args=(0.1,))

    def train():
        work(0.05)
        other.join()

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        taken = save.timed(other.start, train, lambda: time.sleep(0.1))
    finally:
        torch.set_num_threads(before)
    assert taken.wall >= 0.2
    assert taken.cpu >= 0.15
    assert taken.held_up >= 0.1
    assert 0.05 <= taken.training - taken.held_up < 0.09


SMALL = ["model.n_layers=1", "model.dim=64", "model.n_heads=2", "model.n_kv_heads=2", "model.ffn_dim=64"]


def test_step(capsys):
    words = ["model.tied=false", "--presets", "tiny", "--repeats", "1", "--no-lightning", "--json", *SMALL, "+mtp=on"]
    assert step.main(words) == 0
    entry = json.loads(capsys.readouterr().out)["presets"]["tiny"]
    assert entry["tokens_per_second"] == pytest.approx(entry["tokens_per_step"] / entry["step_seconds"])
    assert set(entry["share"]) == {"embedding", "attention", "feed-forward", "head + loss", "optimizer", "data"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--presets", "d21"], "there is no 'd21'; did you mean 'd20'\\?$"),
        (["--presets", "d20", "nano-125m"], "'nano-125m' is no override .* --presets d20,nano-125m"),
        (["--presets", "tiny", "model=d20"], "model=d20: .* --presets"),
        (["--presets", "tiny", "model.n_layer=1"], "did you mean 'model.n_layers'"),
        (["--presets", "tiny", "+collider=on"], "nanochat bench collider"),
        (["--presets", "tiny", "trainer.precision=64-true"], "precision=64-true.* 32-true or bf16-mixed"),
    ],
)
def test_mistakes_of_bench_step(words, said):
    with pytest.raises(UserError, match=said):
        step.main([*words, "--no-lightning"])


BENCHES = ("loss", "mtp", "collider", "export", "step", "optim", "save")


@pytest.mark.parametrize("name", BENCHES)
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", "", "99999999999"])
def test_counts(name, value):
    with pytest.raises(UserError, match=f"nanochat bench {name}: .*--threads: {value} must be a whole number of at"):
        cli.main([name, f"--threads={value}"])


MISTAKES = """
loss --repeats 0
loss --tokens 0
loss --dim -4
loss --vocabulary 0
mtp --batch 0
mtp --seq-len 0
mtp --repeats -1
mtp --preset d21
collider --batch -1
collider --learn -1
collider --sparsity 1
collider --sparsity 0.4,x
collider --sparsity nan
collider --repeats 0
collider --preset tinny
export --tokens 0
export --jsn
step --repeats 0
loss 5
optim --repeats 0
optim --presets d21
optim --optim adamw,mun
optim --presets d20 tiny
"""


@pytest.mark.parametrize("words", MISTAKES.strip().splitlines())
def test_mistakes_are_one_sentence(words, capsys):
    assert nanochat.cli.main(["bench", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def lightning_run(monkeypatch, *overrides):
    """The figures of a short comparison, and what its Trainer was."""
    seen = []

    def build(cfg, folder, loggers):
        seen.append(build_trainer(cfg, folder, loggers))
        return seen[0]

    monkeypatch.setattr(step, "build_trainer", build)
    cfg = step.configure("tiny", "adamw", [*SMALL, "trainer=cpu", *overrides])
    return step.bench_lightning(cfg, batch=1, steps=2, rounds=1), seen[0]


def test_the_share_of_lightning(monkeypatch):
    """On a clock on which a bare step takes 2 s, and what the Trainer does takes 3 s more."""
    now, bare_step = [0.0], step.bare_step

    def timed(*inputs):
        now[0] += 2.0
        return bare_step(*inputs)

    def start(module, batch, batch_idx):
        now[0] += 5.0

    monkeypatch.setattr(step, "clock", lambda: now[0])
    monkeypatch.setattr(step, "bare_step", timed)
    monkeypatch.setattr(step.NanoChatModule, "on_train_batch_start", start)
    figures, trainer = lightning_run(monkeypatch)
    assert figures == {"bare_step_seconds": 2.0, "lightning_ratio": 2.5}
    assert {NonFiniteGuard, Throughput, MetricsCSV} < {type(callback) for callback in trainer.callbacks}
    assert not {Checkpoint, TextSampler, LossPlot} & {type(callback) for callback in trainer.callbacks}
    assert trainer.global_step == 4


def test_both_arms_clip_and_compute_alike(monkeypatch):
    clipped, precisions = [], []
    bare, ours = torch.nn.utils.clip_grad_norm_, NanoChatModule.configure_gradient_clipping
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda p, norm: (clipped.append(("bare", norm)), bare(p, norm))
    )

    def clip(self, optimizer, **given):
        gradients = [p.grad.clone().requires_grad_() for p in self.parameters() if p.grad is not None]
        for gradient in gradients:
            gradient.grad = gradient.detach().clone()
        ours(self, optimizer, **given)
        bare(gradients, 0.5)
        clipped.append(("ours", given["gradient_clip_val"]))
        for gradient, found in zip(gradients, (p for p in self.parameters() if p.grad is not None), strict=True):
            torch.testing.assert_close(found.grad, gradient.grad, rtol=1e-6, atol=0.0)

    monkeypatch.setattr(NanoChatModule, "configure_gradient_clipping", clip)
    trunk = GPT.trunk
    monkeypatch.setattr(GPT, "trunk", lambda self, *inputs: precisions.append(autocast()) or trunk(self, *inputs))
    lightning_run(monkeypatch, "trainer.precision=bf16-mixed", "trainer.gradient_clip_val=0.5")
    assert clipped == [("bare", 0.5)] * 4 + [("ours", 0.5)] * 4
    assert precisions == [torch.bfloat16] * 8


def autocast():
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def test_unknown_bench():
    with pytest.raises(UserError, match="did you mean 'step'"):
        cli.main(["stepp"])


def test_rounds_alternate_and_pair():
    order, ticks = [], iter(range(100))

    def arm(name):
        order.append(name)
        return next(ticks)

    taken = measure.rounds({name: partial(arm, name) for name in "abc"}, repeats=2)
    assert "".join(order) == "abc" + "cba" + "abc"  # the first round warms up
    assert taken == {"a": [5, 6], "b": [4, 7], "c": [3, 8]}
    assert measure.paired_ratio([1.0, 30.0, 4.0], [2.0, 10.0, 1.0]) == 3.0
