"""The acceptance of drafts against decoding by hand, prefix by prefix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanochat.errors import UserError
from nanochat.model import GPT, GPTConfig
from nanochat.objectives import IGNORED
from nanochat.objectives.mtp import MultiTokenPrediction
from nanochat.run import train
from nanochat.training.callbacks.draft_acceptance import DraftAcceptance, acceptance
from tests.runs import configure, read_metrics
from tests.training.callbacks.short_runs import BARE

EOT = 0


def by_hand(gpt: GPT, mtp: MultiTokenPrediction, tokens: list[int]) -> list[float]:
    """For each position alone: a forward pass over the text up to it, and the heads one after the other."""
    accepted, counted = [0] * mtp.tokens, [0] * mtp.tokens
    for t in range(len(tokens)):
        good = True
        for i in range(mtp.tokens):
            target = t + 2 + i
            if target > len(tokens) - 1 or EOT in tokens[t + 1 : target + 1]:
                break
            prefix = torch.tensor([tokens[: t + 1]])
            hidden = gpt.hidden(prefix)
            for depth, head in enumerate(mtp.heads):
                if mtp.kind == "parallel":
                    drafted = head(hidden) if depth == i else None
                elif depth <= i:
                    following = gpt.embed(torch.tensor([tokens[depth + 1 : depth + t + 2]]))
                    drafted = hidden = head(hidden, following, gpt.cos[: t + 1], gpt.sin[: t + 1])
                if depth == i:
                    draft = int(gpt.logits(drafted)[0, -1].argmax())  # type: ignore[arg-type]
            own = int(gpt(torch.tensor([tokens[:target]]))[0, -1].argmax())
            good = good and draft == own
            counted[i] += 1
            accepted[i] += good
    return [a / max(1, c) for a, c in zip(accepted, counted, strict=True)]


@pytest.mark.parametrize("kind", ["sequential", "parallel"])
@torch.no_grad()
def test_acceptance_is_that_of_a_count(kind: str) -> None:
    config = GPTConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=64, vocab_size=4, seq_len=24,
                       activation_scale="none", zero_init=False, tied=False)  # fmt: skip
    gpt, mtp = GPT(config, seed=1), MultiTokenPrediction(config, seed=2, kind=kind, tokens=2)
    for parameter in gpt.head.parameters():  # type: ignore[union-attr]
        parameter.normal_(generator=torch.Generator().manual_seed(3))
    tokens = torch.randint(0, 4, (1, 24), generator=torch.Generator().manual_seed(4))
    targets = torch.cat((tokens[:, 1:], torch.full((1, 1), IGNORED)), 1)
    found = acceptance(gpt, mtp, tokens, targets, EOT).tolist()
    assert found == pytest.approx(by_hand(gpt, mtp, tokens[0].tolist()))
    assert 0 < found[0] < 1
    assert found[1] <= 1


def test_it_is_in_the_rows_of_validations(place: Path) -> None:
    for name, own, columns in (
        ("drafts", ["+mtp=on", "mtp.tokens=2"], ["val/mtp_acceptance_2", "val/mtp_acceptance_3"]),
        ("no heads", ["+mtp=on", "mtp.kind=weights-only"], []),
    ):
        metrics = train(configure(place, [*BARE, *own, "trainer.max_steps=2"]), place / name)
        assert [key for key in metrics if "acceptance" in key] == columns
        rows = [row for row in read_metrics(place / name) if row["val/bpb"]]
        assert all(0 <= float(row[column]) <= 1 for row in rows for column in columns)


def test_what_makes_no_sense() -> None:
    with pytest.raises(UserError, match="must be at least 1"):
        DraftAcceptance(sequences=0)
