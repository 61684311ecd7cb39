"""1, 2 and 4 ranks train the same run: losses, weights and optimizer states.

In float64, since what rounding does to a sum in another order would flip trits and 8-bit codes; and in float32 to the
last bit against the one sum that has the same order, the accumulation of two micro-batches.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import ranks
from nanochat.data.dataset import Batch, TrainBatches
from nanochat.objectives import IGNORED
from nanochat.optim.rules.muon import Muon
from nanochat.training.module import NanoChatModule
from tests.ranks.pools import Pool, close, numbers, train_on
from tests.runs import read_state
from tests.test_resume import OPTIMIZERS

RUN = ["~callbacks.loss_plot", "~callbacks.progress", "~callbacks.sampler", "logger=none", "data.val_tokens=90",
       "trainer.val_check_interval=20", "trainer.max_steps=20", "model.n_layers=1", "data.seq_len=16"]  # fmt: skip
WIDE = [*RUN, "trainer.precision=64-true"]
MTP, COLLIDER = ["+mtp=on", "mtp.token_fraction=0.5"], ["+collider=on", "collider.warmup_steps=0"]
CASES = {  # an optimizer of each family, and every feature
    "muon8bit": ["optim=muon8bit", *MTP, "trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.5"],
    "adamw8bit": ["optim=adamw8bit", *COLLIDER, "+mtp=on", "mtp.kind=parallel", "mtp.tokens=2"],
    "lion": ["optim=lion", "model.value_embeddings=1", "model.tied=false", "trainer.gradient_clip_val=null"],
    "galore-muon8bit": ["optim=galore-muon8bit", "+mhc=on", "mhc.streams=2"],
    "apollo": ["optim=apollo", "loss.z_loss=1e-3", "loss.label_smoothing=0.1", "+mtp=on", "mtp.kind=weights-only"],
}


def compare(place: Path, name: str, pools: Sequence[Pool | None], words: Sequence[str], before=None) -> None:
    """Train on each of the pools; all runs must be close to the first."""
    folders = [place / f"{name}-{i}" for i in range(len(pools))]
    for one, folder in zip(pools, folders, strict=True):
        train_on(one, place, folder, words, before)
        close(folders[0], folder)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_the_run_of_one(place: Path, two: Pool, name: str) -> None:
    compare(place, f"two-{name}", [None, two], [*WIDE, *CASES[name]])


@pytest.mark.slow
def test_four_ranks_train_the_run_of_one(place: Path, four: Pool) -> None:
    compare(place, "four", [None, four], [*WIDE, *CASES["muon8bit"]])


@pytest.mark.slow
@pytest.mark.parametrize("features", [[], *CASES.values()], ids=["plain", *CASES])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_with_every_feature(
    place: Path, two: Pool, four: Pool, optim: str, features: list[str]
) -> None:
    if "lion" in optim and "+mhc=on" in features:
        pytest.skip("equal streams have gradients of zero, and Lion takes the sign of what rounding leaves of it")
    words = [
        *WIDE,
        "model.n_layers=2",
        "data.seq_len=32",
        f"optim={optim}",
        *(word for word in features if not word.startswith("optim=")),
    ]
    compare(place, f"all-{optim}-{len(' '.join(features))}", [None, two, four], words)


def test_two_ranks_add_up_like_two_micro_batches(place: Path, two: Pool) -> None:
    words = [*RUN, "optim=muon8bit", "trainer.gradient_clip_val=null"]
    train_on(two, place, place / "bits-2", words)
    train_on(None, place, place / "bits-1", [*words, "trainer.accumulate_grad_batches=2"], batch=2)
    one, other = numbers(place / "bits-1"), numbers(place / "bits-2")
    for name in one:
        if name.startswith(("weights", "state")):
            assert torch.equal(one[name], other[name]), name


def ignore_some(patch: pytest.MonkeyPatch) -> None:
    """Ignore targets by their own text, more of some rows than of others, and one row entirely."""
    original = TrainBatches.batch

    def batch(self: TrainBatches, index: int) -> Batch:
        found = original(self, index)
        starts = torch.tensor(self.starts(index))[:, None]
        ignored = (found["tokens"] % 7 < starts % 5) | (starts % 3 == 0)
        return {**found, "targets": found["targets"].masked_fill(ignored, IGNORED)}

    patch.setattr(TrainBatches, "batch", batch)


@pytest.mark.parametrize(
    "words",
    [MTP, pytest.param([*COLLIDER, "+mtp=on", "mtp.kind=parallel"], marks=pytest.mark.slow)],
    ids=["sequences", "positions"],
)
def test_the_denominator_is_that_of_all_ranks(place: Path, two: Pool, words: list[str]) -> None:
    compare(place, f"ignored-{words[-1]}", [None, two], [*WIDE, *words], ignore_some)


def time_one_rank_apart(patch: pytest.MonkeyPatch) -> None:
    """A last rank whose probe finds another dtype for Newton-Schulz, as another machine's may."""
    original = Muon.auto

    def auto(self: Muon, device: torch.device) -> dict[str, Any]:
        found = original(self, device)
        return {**found, "ns_dtype": "bfloat16"} if ranks.rank() else found

    patch.setattr(Muon, "auto", auto)


def test_what_auto_stands_for_is_that_of_rank_zero(place: Path, two: Pool) -> None:
    words = [*WIDE, "optim=muon", "trainer.max_steps=3", "trainer.val_check_interval=3"]
    compare(place, "auto", [None, two], words, time_one_rank_apart)


def spoil_one_row(step: int, patch: pytest.MonkeyPatch) -> None:
    """Make the loss of the rank that has the last row of a step's micro-batch infinite."""
    original = NanoChatModule.training_step

    def training_step(self: NanoChatModule, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss = original(self, batch, batch_idx)
        last = self.trainer.global_rank == self.trainer.world_size - 1
        return loss * float("inf") if last and self.global_step == step else loss

    patch.setattr(NanoChatModule, "training_step", training_step)


@pytest.mark.parametrize(
    "guard", [[], pytest.param(["~callbacks.guard"], marks=pytest.mark.slow)], ids=["guard", "no-guard"]
)
def test_a_step_that_is_not_finite_on_one_rank_is_dropped_on_all(place: Path, two: Pool, guard: list[str]) -> None:
    words = [*WIDE, "optim=muon8bit", "trainer.max_steps=5", *guard]
    name = f"spoilt-{len(guard)}"
    compare(place, name, [None, two], words, partial(spoil_one_row, 2))
    assert numbers(place / f"{name}-1")["skipped_steps"].tolist() == [0, 0, 1, 1, 1]


def interrupt_one_rank(patch: pytest.MonkeyPatch) -> None:
    """SIGTERM for the last rank alone, in the middle of its third step."""
    original = NanoChatModule.training_step

    def training_step(self: NanoChatModule, batch: Batch, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_rank == self.trainer.world_size - 1 and self.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    patch.setattr(NanoChatModule, "training_step", training_step)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(place: Path, two: Pool) -> None:
    words = [*WIDE, "trainer.max_steps=6"]
    assert train_on(two, place, place / "signal", words, interrupt_one_rank) == [143, 143]
    assert read_state(place / "signal")["global_step"] == 3
    train_on(two, place, place / "signal", [*words, "ckpt_path=auto"])
    train_on(None, place, place / "no-signal", words)
    close(place / "no-signal", place / "signal")


@pytest.mark.slow
def test_a_run_goes_on_at_other_numbers_of_ranks(place: Path, two: Pool, four: Pool) -> None:
    words = [*WIDE, "optim=muon8bit", *MTP, *COLLIDER, "schedule=constant", "schedule.warmup_steps=0"]
    for one, steps in ((two, 8), (None, 13), (four, 20)):
        ckpt = "auto" if steps > 8 else "null"
        train_on(one, place, place / "moved", [*words, f"trainer.max_steps={steps}", f"ckpt_path={ckpt}"])
    train_on(None, place, place / "unmoved", words)
    a, b = numbers(place / "unmoved"), numbers(place / "moved")
    for name in a:
        if name != "val/loss":  # it was validated more often
            assert torch.allclose(a[name].double(), b[name].double(), 1e-5, 1e-5), name
