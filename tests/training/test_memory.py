"""The prediction of memory: what is counted without memory is what a real step holds, to the byte."""

import itertools
from typing import Any

import pytest
import torch

from nanochat.config.compose import compose
from nanochat.config.vocabulary import plan_vocabulary
from nanochat.run import settle
from nanochat.training.ledger import ACTIVATIONS, GRADIENTS, STATES, TRITS, WEIGHTS, WORKSPACE, Ledger
from nanochat.training.memory import Rehearsal, predict

SMALL = [
    "experiment=tiny", "model.dim=64", "model.n_layers=2", "model.ffn_dim=128", "data.seq_len=32", "data.batch_size=4",
    "model.vocab_size=300", "tokenizer=byte", "trainer=cpu", "trainer.precision=32-true",
]  # fmt: skip
BF16 = "trainer.precision=bf16-mixed"
CASES = [
    [],
    ["+mtp=on", "optim=adamw8bit"],
    ["+collider=on", "optim=muon8bit", "+mtp=on"],
    ["+mhc=on", "activation_checkpointing=block", "trainer.accumulate_grad_batches=2"],
    ["+mhc=on", "mhc.maps=dynamic", "model.value_embeddings=2", "activation_checkpointing=feedforward", "optim=apollo"],
    [BF16, "+collider=on", "optim=galore8bit", "optim.rank=8", "activation_checkpointing=every_other"],
    [BF16, "model.weight_block=row", "model.int8=true", "optim=lion8bit"],
    ["weights=bfloat16", "optim=adamw", "+mtp=on", "+collider=on", "model.tied=false", "model.value_embeddings=1"],
    ["weights=bfloat16-master", BF16, "optim=muon8bit", "+mhc=on", "mhc.maps=dynamic", "model.ternary=false"],
    ["weights=bfloat16", "model.weight_block=row", "model.int8=true", "optim=muon", "+collider=on", "model.tied=false"],
    ["model.ternary=false", "loss.label_smoothing=0.1", "model.softcap=20", "optim=galore-muon8bit", "optim.rank=8"],
]


def settled(*overrides):
    return plan_vocabulary(settle(compose([*SMALL, *overrides])))


def counted(cfg):
    """The prediction, from a real step: of networks this small that takes less time."""
    return predict(cfg, fake=False)


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_the_rehearsal_holds_what_a_real_step_holds(overrides):
    cfg = settled(*overrides)
    predicted, real = predict(cfg), predict(cfg, fake=False)
    assert predicted == real
    assert predicted.peak == max(predicted.others.values()) > predicted.fixed > 0


def allocated_at_the_peak(cfg):
    """Bytes that torch's allocator has given out at most in a real step, above what is there before it: no count of
    ours takes part."""
    run = Rehearsal(cfg, torch.device("cpu"), Ledger())

    def step():
        for _ in range(run.accumulate):
            run.micro_batch()
        run.update()

    step()  # makes the optimizer's state, and what is kept from then on
    states = [value for state in run.optimizer.state.values() for value in state.values()]
    kept = [*run.module.parameters(), *run.module.buffers(), *(one for one in states if isinstance(one, torch.Tensor))]
    before = sum({one.data_ptr(): one.untyped_storage().nbytes() for one in kept}.values())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    recorded: Any = profiler.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return before + max(itertools.accumulate(sizes))


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim=adamw", "trainer.accumulate_grad_batches=2"],
        ["weights=bfloat16", "optim=adamw", "trainer.accumulate_grad_batches=2"],
        ["weights=bfloat16-master", "optim=muon8bit", "model.tied=false"],
    ],
    ids=" ".join,
)
def test_the_allocator_gives_out_as_much(overrides):
    cfg = settled(*overrides)
    assert counted(cfg).peak == pytest.approx(allocated_at_the_peak(cfg), rel=0.002)


def test_parts_against_their_own_sizes():
    plain = counted(settled("optim=adamw"))
    size = plain.parts[WEIGHTS]
    assert 2 * size * 0.95 < plain.parts[STATES] < 2 * size * 1.05
    assert plain.parts[TRITS] == 0
    accumulated = counted(settled("optim=adamw", "trainer.accumulate_grad_batches=2"))
    assert size * 0.95 < accumulated.parts[GRADIENTS] <= size
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert matrices < accumulated.parts[TRITS] < 1.1 * matrices


def test_weights_in_bfloat16_take_half():
    wide, small, copies = (
        counted(settled("optim=adamw", "trainer.accumulate_grad_batches=2", f"weights={kind}")).parts
        for kind in ("float32", "bfloat16", "bfloat16-master")
    )
    vectors = 0.05 * wide[WEIGHTS]  # and buffers, which stay as they are
    for kind in (WEIGHTS, GRADIENTS):
        assert wide[kind] / 2 <= small[kind] == copies[kind] < wide[kind] / 2 + vectors
    assert small[STATES] == wide[STATES]
    assert wide[WEIGHTS] - vectors < copies[STATES] - small[STATES] <= wide[WEIGHTS]


def test_what_grows_with_the_batch():
    one, two, four = (counted(settled(f"data.batch_size={size}")).parts for size in (4, 8, 16))
    assert one[WEIGHTS] == two[WEIGHTS]
    constant = 2 * one[ACTIVATIONS] - two[ACTIVATIONS]  # weights in their ternary form
    assert four[ACTIVATIONS] == 4 * (one[ACTIVATIONS] - constant) + constant


def test_checkpointing_saves_what_it_says():
    sizes = [
        counted(settled(f"activation_checkpointing={mode}", "model.n_layers=4")).parts[ACTIVATIONS]
        for mode in ("none", "feedforward", "every_other", "block")
    ]
    assert sizes[0] > sizes[1] > sizes[3]
    assert sizes[0] > sizes[2] > sizes[3]


def test_a_ledger_by_hand():
    with Ledger() as ledger:
        a = torch.zeros(1000)  # 4,000 bytes
        ledger.mark(WEIGHTS, [a])
        b = a + 1
        view = b[:10]
        del b
        assert ledger.held[WORKSPACE] == 4000
        del view
        assert ledger.held == {WEIGHTS: 4000, WORKSPACE: 0}
        a.mul_(2)
    assert ledger.peak == {WEIGHTS: 4000, WORKSPACE: 4000}


def test_what_autograd_keeps_is_marked():
    x = torch.ones(1000, requires_grad=True)
    with Ledger() as ledger:
        ledger.mark(WEIGHTS, [x])
        with ledger.saving():
            y = x.exp()  # saves its result
            z = y * 2
        assert ledger.held == {WEIGHTS: 4000, ACTIVATIONS: 4000, WORKSPACE: 4000}
        z.sum().backward()
        del y, z
        assert ledger.held[ACTIVATIONS] == 0


def test_what_ranks_share_is_divided():
    cfg = ["optim=adamw", "+mtp=on", "model.tied=false", "model.n_layers=4"]
    whole = counted(settled(*cfg))
    parts = [settled(*cfg, "+trainer.strategy=fsdp2", f"trainer.devices={n}") for n in (2, 4, 8)]
    held = [counted(one).parts for one in parts]
    block = 4 * (4 * 64 * 64 + 3 * 64 * 128)
    head = block + 4 * 2 * 64 * 64  # MTP's, the largest block
    tables = whole.parts[WEIGHTS] - 4 * block - head
    for count, one in zip((2, 4, 8), held, strict=True):
        assert one[STATES] == pytest.approx(whole.parts[STATES] / count, rel=0.01)
        own = whole.parts[WEIGHTS] / count
        # beside its own a rank has the tables, two blocks, and the buffer in which the next one arrives
        assert one[WEIGHTS] == pytest.approx(own + (1 - 1 / count) * tables + 3 * head, rel=0.02)
    assert whole.peak > sum(held[0].values()) > sum(held[1].values()) > sum(held[2].values())
    assert counted(settled(*cfg, "trainer.devices=4")) == whole  # trainer=ddp keeps all on each


def test_a_ledger_counts_parts():
    with Ledger() as ledger:
        a = torch.zeros(1000)
        ledger.mark(WEIGHTS, [a], 4)
        assert ledger.held[WEIGHTS] == 1000
        ledger.restart()
        b = torch.zeros(10)
        assert sum(ledger.peak.values()) == 1040
        del a, b
        assert not sum(ledger.held.values())


@pytest.fixture
def offloading(monkeypatch):
    """The CPU stands for a GPU: its optimizer states go to another place."""
    for module in ("offload", "optimizer"):
        monkeypatch.setattr(f"nanochat.optim.{module}.leaves", lambda device: True)
    monkeypatch.setattr("nanochat.optim.offload.SMALLEST", 4096)


@pytest.mark.parametrize(
    "overrides",
    [["optim=muon8bit"], ["optim=lion", "weights=bfloat16-master"]],
    ids=" ".join,
)
def test_states_in_another_memory_do_not_count(overrides, offloading):
    accumulated = [*overrides, "trainer.accumulate_grad_batches=2"]
    plain, cfg = counted(settled(*accumulated)), settled(*accumulated, "offload_optimizer=true")
    memory = predict(cfg)
    assert memory == counted(cfg)
    assert memory.offloaded + memory.parts[STATES] == plain.parts[STATES]
    assert memory.parts[STATES] < 0.25 * plain.parts[STATES]
    assert memory.others["forward and backward"] == plain.others["forward and backward"] - memory.offloaded
    # those of the parameter at hand are here during the update: of the table at most, the largest
    largest = plain.parts[STATES] * 300 * 64 / (300 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128))
    fallen = plain.others["optimizer"] - memory.others["optimizer"]
    assert memory.offloaded - 1.1 * largest <= fallen < memory.offloaded
    assert memory.peak + memory.offloaded == pytest.approx(allocated_at_the_peak(cfg), rel=0.002)
