"""Who updates what, where its state is, and how many bytes travel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nanochat.optim.distributed import assign
from nanochat.optim.optimizer import Optimizer, tensor_bytes
from nanochat.rank import work
from nanochat.training.launcher import Job
from tests.ranks.pools import Pool, job_of
from tests.ranks.test_agreement import CASES, WIDE
from tests.runs import read_metrics, read_state

STEPS = 3
COLLECTIVES = ("reduce", "broadcast", "all_reduce", "all_gather", "send", "gather_object")


def test_the_dearest_go_to_who_has_the_least_to_do() -> None:
    assert assign([1, 9, 4, 4, 2], 2) == [0, 0, 1, 1, 1]
    assert assign([3, 3, 3, 3], 4) == [0, 1, 2, 3]
    assert assign([5, 5], 1) == [0, 0]
    generator = torch.Generator().manual_seed(0)
    costs = torch.rand(100, generator=generator).tolist()
    loads = Counter[int]()
    for cost, owner in zip(costs, assign(costs, 4), strict=True):
        loads[owner] += cost
    assert max(loads.values()) - min(loads.values()) < min(costs) + 0.1


class Measured:
    """A run that counts the bytes handed to each collective in its steps, and its own optimizer's."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self) -> dict[str, Any]:
        sent, found = Counter[str](), {}
        with pytest.MonkeyPatch.context() as patch:
            for name in COLLECTIVES:
                patch.setattr(dist, name, self._counting(name, getattr(dist, name), sent))
            original = Optimizer.step

            def step(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
                before = sent.copy()
                loss = original(optimizer, closure)
                found["step"] = sent - before
                found["state"] = sum(tensor_bytes(state) for state in optimizer.state.values())
                found["all"] = optimizer.state_bytes()
                return loss

            patch.setattr(Optimizer, "step", step)
            work(self.job)
        return found

    @staticmethod
    def _counting(name: str, collective: Callable[..., Any], sent: Counter[str]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensor = args[1] if name == "all_gather" else args[0]
            sent[name] += tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) else 0
            return collective(*args, **kwargs)

        return counted


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_each_state_is_in_one_place_and_each_tensor_travels_once(
    place: Path, request: pytest.FixtureRequest, count: int
) -> None:
    ranks: Pool = request.getfixturevalue({2: "two", 4: "four"}[count])
    folder = place / f"bytes-{count}"
    words = [*WIDE, *CASES["galore-muon8bit"], "trainer.precision=32-true", f"trainer.max_steps={STEPS}"]
    found = ranks.call(Measured(job_of(place, folder, [*words, "data.batch_size=2", f"trainer.devices={count}"])))
    parameters = sum(4 * value.numel() for value in read_state(folder)["state_dict"].values())
    for one in found:
        assert one["step"]["reduce"] == one["step"]["broadcast"] == parameters  # gradients there, weights back
        assert sum(one["step"].values()) < 2.01 * parameters
        assert one["all"] == found[0]["all"]
    assert sum(one["state"] for one in found) == found[0]["all"]
    assert max(one["state"] for one in found) < 0.8 * found[0]["all"]
    saved = read_state(folder)["optimizer_states"][0]["state"]
    assert sum(tensor_bytes(state) for state in saved.values()) == found[0]["all"]
    assert {row["optim/bytes"] for row in read_metrics(folder) if row["optim/bytes"]} == {str(found[0]["all"])}
