"""1, 2 and 4 ranks that share the model (trainer=fsdp2) train the same run, each with its part of everything."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat import ranks
from nanochat.config.check import check
from nanochat.errors import ConfigError
from nanochat.objectives import Objective, Step
from nanochat.optim.optimizer import Optimizer, tensor_bytes
from nanochat.optim.rules import RULES
from nanochat.optim.sharded import part_shapes
from nanochat.rank import work
from nanochat.training import distributed
from nanochat.training.launcher import Job
from nanochat.training.module import NanoChatModule
from tests.ranks.pools import Pool, job_of, numbers, train_on
from tests.ranks.test_agreement import COLLIDER, MTP, RUN, WIDE, compare
from tests.ranks.test_launcher import lose_a_rank
from tests.runs import configure, read_state

SHARDED = ["+trainer.strategy=fsdp2"]  # what trainer=fsdp2 says, beside the trainer=cpu of all tests
UNEVEN = ["model.ffn_dim=130", "model.n_layers=2"]  # 130 rows are no four equal parts, nor whole blocks of 8-bit states
RUNS = {
    "adamw": ["optim=adamw", *MTP, "trainer.gradient_clip_val=0.5", "activation_checkpointing=block"],
    "adamw8bit": ["optim=adamw8bit", "+mtp=on", "mtp.kind=parallel", "mtp.tokens=2", "optim.block_size=64"],
    "muon": ["optim=muon", *COLLIDER, "model.tied=false", "model.value_embeddings=1"],
    "muon8bit": ["optim=muon8bit", *MTP, *COLLIDER, "trainer.accumulate_grad_batches=2", "+mhc=on"],
    "lion8bit": ["optim=lion8bit", "activation_checkpointing=every_other", "+mtp=on", "mtp.kind=weights-only"],
    "galore-muon8bit": ["optim=galore-muon8bit", "optim.update_period=7", "trainer.gradient_clip_val=null"],
    "apollo": ["optim=apollo", "loss.z_loss=1e-3", "loss.label_smoothing=0.1"],
}
slow = pytest.mark.slow


def words_of(name: str) -> list[str]:
    return [*SHARDED, *WIDE, *UNEVEN, *RUNS[name]]


def mind_views(patch: pytest.MonkeyPatch) -> None:
    """A warning of FSDP2's fails the run, unless the run itself says that it is harmless."""
    warnings.filterwarnings("error", message="FSDP2-wrapped module")


def test_two_ranks_that_share_the_model_take_the_steps_of_one(place: Path, two: Pool) -> None:
    words = [*words_of("muon8bit"), "trainer.max_steps=5", "trainer.val_check_interval=5", "model.n_layers=1"]
    compare(place, "sharded", [None, two], words, before=mind_views)


@slow
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_that_share_the_model_train_the_run_of_one(place: Path, two: Pool, name: str) -> None:
    compare(place, f"sharded-{name}", [None, two], words_of(name))


@slow
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon", "muon8bit"])
def test_four_ranks_that_share_the_model_train_the_run_of_one(place: Path, four: Pool, name: str) -> None:
    compare(place, f"sharded-four-{name}", [None, four], words_of(name))


@slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_two_ranks_that_share_the_model_add_up_like_two_micro_batches(place: Path, two: Pool, precision: str) -> None:
    words = [*SHARDED, *RUN, "optim=muon8bit", "trainer.gradient_clip_val=null", f"trainer.precision={precision}"]
    train_on(two, place, place / f"shared-bits-2-{precision}", words)
    more = [*words, "trainer.accumulate_grad_batches=2"]
    train_on(None, place, place / f"shared-bits-1-{precision}", more, batch=2)
    one, other = numbers(place / f"shared-bits-1-{precision}"), numbers(place / f"shared-bits-2-{precision}")
    for name in one:
        if name.startswith(("weights", "state")):
            assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize(
    ("strategy", "weights", "optim"),
    [
        ([], "bfloat16", "muon8bit"),
        (SHARDED, "bfloat16", "adamw"),
        pytest.param([], "bfloat16-master", "adamw8bit", marks=slow),
        pytest.param(SHARDED, "bfloat16", "muon8bit", marks=slow),
        pytest.param(SHARDED, "bfloat16-master", "muon", marks=slow),
        pytest.param(SHARDED, "bfloat16-master", "adamw", marks=slow),
    ],
)
def test_weights_in_bfloat16_go_the_way_of_two_micro_batches(
    place: Path, two: Pool, strategy: list[str], weights: str, optim: str
) -> None:
    name = f"{weights}-{optim}-{len(strategy)}"
    words = [*strategy, *RUN, *UNEVEN, f"optim={optim}", f"weights={weights}", "trainer.gradient_clip_val=null",
             "schedule=constant", "schedule.warmup_steps=0", "trainer.val_check_interval=8"]  # fmt: skip
    for steps, start in ((4, "null"), (8, "auto")):  # a resume changes nothing
        train_on(two, place, place / f"{name}-2", [*words, f"trainer.max_steps={steps}", f"ckpt_path={start}"])
    more = [*words, "trainer.max_steps=8", "trainer.accumulate_grad_batches=2"]
    train_on(None, place, place / f"{name}-1", more, batch=2)
    one, other = numbers(place / f"{name}-1"), numbers(place / f"{name}-2")
    assert any(value.dtype == torch.bfloat16 for value in one.values())
    for key in one:
        if key.startswith(("weights", "state")):
            assert torch.equal(one[key], other[key]), key


@slow
def test_a_run_moves_between_numbers_of_ranks_and_ways_to_use_them(place: Path, two: Pool, four: Pool) -> None:
    words = [*WIDE, *UNEVEN, "optim=muon8bit", "optim.block_size=64", *MTP, "schedule=constant",
             "schedule.warmup_steps=0"]  # fmt: skip
    turns = [(two, SHARDED, 5), (None, [], 8), (four, SHARDED, 13), (two, [], 16), (two, SHARDED, 20)]
    for i, (pool, trainer, steps) in enumerate(turns):
        more = [*trainer, *words, f"trainer.max_steps={steps}", f"ckpt_path={'auto' if i else 'null'}"]
        train_on(pool, place, place / "shared-moved", more)
    train_on(None, place, place / "shared-unmoved", words)
    a, b = numbers(place / "shared-unmoved"), numbers(place / "shared-moved")
    for name in a:
        if name != "val/loss":  # it was validated more often
            assert torch.allclose(a[name].double(), b[name].double(), 1e-5, 1e-5), name


def test_ranks_that_share_the_model_write_the_samples_of_one(place: Path, two: Pool) -> None:
    words = [*SHARDED, *(word for word in WIDE if word != "~callbacks.sampler"), "callbacks.sampler.max_tokens=40",
             "model.n_layers=2", "model.int8=false", "trainer.max_steps=4", "trainer.val_check_interval=2"]  # fmt: skip
    compare(place, "samples", [None, two], words)  # the ranks train on after the first sample
    one, other = ((place / f"samples-{i}" / "samples.md").read_text() for i in range(2))
    assert one == other
    assert one.count("## Step") == 2
    assert len(one) > 200


# ---- who holds what --------------------------------------------------------------------------------------------------


NEW = hasattr(dist, "all_gather_single")  # torch 2.13's names of what fully_shard calls
GATHER = "all_gather_single" if NEW else "all_gather_into_tensor"
SCATTER = "reduce_scatter_single" if NEW else "reduce_scatter_tensor"
EXCHANGE = "all_to_all_single"


class Held:
    """A run that counts the bytes of this rank's tensors in its last step, and what it hands to collectives there."""

    def __init__(self, job: Job) -> None:
        self.job, self.built = job, 0

    def __call__(self) -> Counter[str]:
        found, open_ = Counter[str](), []
        original = Optimizer.step

        def size(tensors: list[Tensor]) -> int:
            storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
            return sum(storages.values())

        def step(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            found.clear()
            open_.append(True)

            def watched() -> Any:
                loss = None if closure is None else closure()
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                found["weights"] = size([ranks.own_part(p.detach()) for p in parameters])
                found["gradients"] = size([ranks.own_part(p.grad) for p in parameters if p.grad is not None])
                return loss

            result = original(optimizer, watched)
            found["states"] = sum(tensor_bytes(state) for state in optimizer.state.values())
            open_.clear()
            return result

        def counting(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **kwargs: Any) -> Any:
                tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
                # of what is gathered or scattered the whole, of what is exchanged the part of this rank
                found[name] += bool(open_) * max(tensor.nbytes for tensor in tensors[: 1 + (name != EXCHANGE)])
                return collective(*args, **kwargs)

            return counted

        cut = distributed.shard

        def shard(module: NanoChatModule, device: torch.device) -> None:
            self.built = sum(parameter.nbytes for parameter in module.parameters() if not parameter.is_meta)
            cut(module, device)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "shard", shard)
            patch.setattr(Optimizer, "step", step)
            for name in (GATHER, SCATTER, EXCHANGE):
                patch.setattr(dist, name, counting(name, getattr(dist, name)))
            work(self.job)
        found["built"] = self.built
        return found


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=slow)])
def test_each_rank_holds_its_part_alone(place: Path, request: pytest.FixtureRequest, count: int) -> None:
    pool: Pool = request.getfixturevalue({2: "two", 4: "four"}[count])
    words = [*SHARDED, *RUN, "trainer.precision=32-true", "trainer.max_steps=2", "trainer.val_check_interval=1"]
    words += ["data.batch_size=1", f"trainer.devices={count}"]
    for optim in ("adamw", "muon"):
        folder = place / f"held-{optim}-{count}"
        found = pool.call(Held(job_of(place, folder, [*words, f"optim={optim}"])))
        state = read_state(folder)
        weights, saved = state["state_dict"], state["optimizer_states"][0]["state"]
        whole = sum(4 * value.numel() for value in weights.values())
        states = sum(tensor_bytes(one) for one in saved.values())
        assert [one["built"] for one in found] == [whole, *[0] * (count - 1)]
        for one in found:  # but for what fills the last rows up
            assert one["weights"] == pytest.approx(whole / count, rel=0.02)
            assert one["gradients"] == pytest.approx(whole / count, rel=0.02)
        if optim == "adamw":
            assert states == pytest.approx(2 * whole, rel=0.01)
            for one in found:
                assert one["states"] == pytest.approx(states / count, rel=0.02)
                assert one[EXCHANGE] == 0
                tables = 4 * sum(value.numel() for name, value in weights.items() if ".blocks." not in name)
                assert one[GATHER] == pytest.approx(2 * whole - tables, rel=0.02)
                assert one[SCATTER] == pytest.approx(whole, rel=0.02)
        else:
            assert sum(one["states"] for one in found) == pytest.approx(states, rel=0.01)
            owned = 4 * sum(weights[name].numel() for name, one in saved.items() if "momentum" in one)
            sent = sum(one[EXCHANGE] for one in found)
            assert 0 < sent == pytest.approx(3 * owned, rel=0.1)


def test_which_rules_split_a_parameter() -> None:
    weight = torch.empty(10, 1024, device="meta")
    halves, quarters = part_shapes(weight, 2), part_shapes(weight, 4)
    assert [tuple(shape) for shape in quarters] == [(3, 1024), (3, 1024), (3, 1024), (1, 1024)]
    assert [tuple(shape) for shape in part_shapes(torch.empty(2), 4)] == [(1,), (1,), (0,), (0,)]
    assert RULES["adamw"].splits({}, quarters)
    assert not RULES["muon"].splits({}, halves)
    group = {"block_size": 1024, "kernels": "tensor", "stochastic_rounding": False}
    assert RULES["adamw8bit"].splits(group, halves)
    assert not RULES["adamw8bit"].splits(group, quarters)  # 3,072 elements would have 32-bit states
    assert not RULES["adamw8bit"].splits({**group, "block_size": 2048}, halves)  # a block would cross
    assert not RULES["adamw8bit"].splits({**group, "stochastic_rounding": True}, halves)
    assert RULES["adamw8bit"].splits(group, part_shapes(torch.empty(3, 1000), 2))  # 32-bit states anyway


# ---- what is refused, and what ends ----------------------------------------------------------------------------------


class Scaled(Objective):
    """An objective with a parameter that has no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, step: Step) -> Tensor:
        return step.hidden.mean() * self.scale


def test_a_parameter_without_rows_is_refused(place: Path) -> None:
    words = [*SHARDED, *RUN, f"+scaled={{_target_: {__name__}.Scaled}}", "trainer.devices=2", "optim=adamw"]
    with pytest.raises(ConfigError, match=r"trainer=fsdp2 .* objectives\.scaled\.scale") as error:
        check(configure(place, words))
    assert len(error.value.problems) == 1


@slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux' /proc")
def test_a_killed_rank_ends_the_job_and_the_next_start_goes_on(place: Path) -> None:
    lose_a_rank(place, place / "shared-killed", 40, *SHARDED)
