"""1, 2 and 4 ranks that share the model (trainer=fsdp2) train the same run, each with its part of everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks.pools import Pool
from tests.ranks.test_agreement import CASES, COLLIDER, MTP, WIDE, compare

SHARDED = ["trainer=fsdp2", "trainer.accelerator=cpu"]
UNEVEN = ["model.ffn_dim=130", "model.n_layers=2"]
RUNS = {
    "adamw": ["optim=adamw", *MTP, "trainer.gradient_clip_val=0.5"],
    "muon": ["optim=muon", *COLLIDER, "model.tied=false", "model.value_embeddings=1"],
    "muon8bit": ["optim=muon8bit", *MTP, *COLLIDER, "trainer.accumulate_grad_batches=2", "+mhc=on"],
}


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_that_share_the_model_train_the_run_of_one(place: Path, two: Pool, name: str) -> None:
    compare(place, f"sharded-{name}", [None, two], [*SHARDED, *WIDE, *UNEVEN, *RUNS[name]])
