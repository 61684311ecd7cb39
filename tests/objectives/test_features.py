"""MTP and Collider in real runs: bit-identical when off, exact on resume, seen by training alone."""

import pytest
import torch

from nanochat.checkpoint import load_run
from nanochat.errors import UserError
from nanochat.objectives import linear_cross_entropy
from nanochat.run import train
from nanochat.training.module import NanoChatModule
from tests.runs import configure, read_metrics, read_state, same

RUN = [
    "trainer.max_steps=4", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=2",
    "callbacks.checkpoint.every_n_train_steps=2", "~callbacks.loss_plot", "~callbacks.progress", "~callbacks.sampler",
    "data.val_tokens=64",
]  # fmt: skip
BOTH = ["+mtp=on", "+collider=on", "collider.warmup_steps=0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def run(place):
    """Train with these overrides; returns the run's folder (the same overrides are trained once)."""
    done = {}

    def go(*overrides):
        if overrides not in done:
            done[overrides] = place / f"run{len(done)}"
            train(configure(place, [*RUN, *overrides]), done[overrides])
        return done[overrides]

    return go


def train_rows(folder):
    """The rows of metrics.csv that are not a validation's."""
    return [row for row in read_metrics(folder) if row["train/loss"]]


@pytest.mark.parametrize(
    "off",
    [
        ["+mtp=off", "+collider=off"],
        ["+mtp=on", "mtp.weight=0"],
        ["+mtp=on", "mtp.kind=weights-only", "mtp.weight=0"],
        ["+collider=on", "collider.sparsity=0", "collider.warmup_steps=0"],
    ],
    ids=" ".join,
)
def test_off_is_the_plain_run_to_the_last_bit(run, off):
    plain, other = run(), run(*off)
    states = [read_state(folder) for folder in (plain, other)]
    for state in states:
        del state["optimizer_states"]  # with heads it has more parameters
        state["state_dict"] = {n: t for n, t in state["state_dict"].items() if n.startswith("gpt.")}
    same(*states)
    columns = ("step", "train/loss", "train/grad_norm", "val/loss")
    rows = [[tuple(row[c] for c in columns) for row in read_metrics(folder)] for folder in (plain, other)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("kind", ["sequential", "parallel"])
def test_heads_are_saved_and_not_in_the_network(run, kind):
    found = load_run(run("+mtp=on", f"mtp.kind={kind}"))
    assert all(name.startswith("mtp.heads.0.") for name in found.objectives)
    assert found.objectives
    assert not any("mtp" in name for name in found.gpt.state_dict())
    start = NanoChatModule(found.meta["hyper_parameters"]["cfg"]).objectives.state_dict()
    assert found.objectives.keys() == start.keys()
    assert all(not torch.equal(found.objectives[name], start[name]) for name in start)


def test_a_resume_without_the_feature_is_refused(run, place):
    folder = run("+mtp=on", "mtp.kind=sequential")
    with pytest.raises(UserError, match="mtp"):
        train(configure(place, [*RUN, "ckpt_path=last"]), folder)


@pytest.mark.parametrize(
    "features",
    [BOTH, [*BOTH, "mtp.kind=parallel", "mtp.tokens=3", "collider.score=gradient"]],
    ids=["default", "other"],
)
def test_resume_is_exact(run, place, features, monkeypatch):
    whole, folder = run(*features), place / f"resumed{len(features)}"
    original, count = NanoChatModule.training_step, 0

    def training_step(self, batch, batch_idx):
        nonlocal count
        count += 1
        if count == 6:
            raise RuntimeError("stop")
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(NanoChatModule, "training_step", training_step)
        with pytest.raises(RuntimeError, match="stop"):
            train(configure(place, [*RUN, *features]), folder)
    train(configure(place, [*RUN, *features, "ckpt_path=last"]), folder)
    assert read_metrics(whole) == read_metrics(folder)
    same(read_state(whole), read_state(folder))


def test_the_filter_is_seen_by_training_alone(place, monkeypatch):
    seen = {"train": set(), "validate": set()}

    def watch(name, where):
        original = getattr(NanoChatModule, name)

        def step(self, batch, batch_idx):
            filtered = self.gpt.kept_rows is not None, self.objectives["next_token"].selector is not None
            seen[where].add((self.global_step, *filtered))
            watch.module = self
            return original(self, batch, batch_idx)

        monkeypatch.setattr(NanoChatModule, name, step)

    watch("training_step", "train")
    watch("validation_step", "validate")
    settings = ["trainer.max_steps=20", "trainer.accumulate_grad_batches=1", "trainer.val_check_interval=10",
                "callbacks.checkpoint.every_n_train_steps=100", "+collider=on", "collider.warmup_steps=50",
                "collider.score=loss"]  # fmt: skip
    train(configure(place, [*RUN, *settings]), place / "watched")
    # the warm-up is at most a tenth of the run
    assert seen["train"] == {(s, s >= 2, s >= 2) for s in range(20)}
    assert seen["validate"] == {(10, False, False), (20, False, False)}
    assert watch.module.gpt.kept_rows is None
    assert watch.module.objectives["next_token"].selector is None
    rows = train_rows(place / "watched")
    assert [bool(row["collider/kept_fraction"]) for row in rows] == [step >= 2 for step in range(20)]
    row = rows[-1]
    assert float(row["collider/kept_fraction"]) == pytest.approx(19 / 32, abs=0.01)
    assert float(row["collider/dropped_loss"]) < float(row["train/loss"]) < float(row["collider/kept_loss"])


def test_excess_loss_reads_the_reference_once(run, place, monkeypatch):
    reference, cache = run(), place / "scores"
    settings = ["+collider=on", "collider.warmup_steps=0", "collider.score=excess",
                f"collider.reference={reference}", f"collider.cache={cache}"]  # fmt: skip
    first = run(*settings)
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return linear_cross_entropy(*args, **kwargs)

    monkeypatch.setattr("nanochat.training.callbacks.collider.linear_cross_entropy", counted)
    train(configure(place, [*RUN, *settings]), place / "cached")
    assert not calls
    assert read_metrics(first) == read_metrics(place / "cached")
    train(configure(place, [*RUN, *settings[:-1]]), place / "uncached")
    assert calls
    assert read_metrics(first)[0] == read_metrics(place / "uncached")[0]
    plain = run("+collider=on", "collider.warmup_steps=0")
    assert read_metrics(first)[0]["collider/kept_loss"] != read_metrics(plain)[0]["collider/kept_loss"]


def test_a_reference_of_another_tokenizer_is_refused(run, place):
    settings = ["+collider=on", "collider.score=excess", f"collider.reference={run()}"]
    other = ["tokenizer=bpe", "tokenizer.vocab_size=280", "model.vocab_size=280"]
    with pytest.raises(UserError, match="another tokenizer"):
        train(configure(place, [*RUN, *settings, *other]), place / "foreign")


def test_bf16(run, place):
    train(configure(place, [*RUN, *BOTH, "trainer.precision=bf16-mixed"]), place / "bf16")
    bf16, exact = (train_rows(folder)[-1] for folder in (place / "bf16", run(*BOTH)))
    assert float(bf16["train/loss"]) == pytest.approx(float(exact["train/loss"]), rel=0.05)
