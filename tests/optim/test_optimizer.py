"""What holds for every shipped optimizer: state, skipping, saving, Lightning."""

import copy

import lightning
import pytest
import torch

from nanochat.errors import UserError
from tests.optim.helpers import NAMES, Net, batch, make, reloaded, train


def snapshot(net, optimizer):
    return copy.deepcopy((list(net.parameters()), optimizer.state_dict()["state"]))


def assert_bit_equal(a, b):
    for x, y in zip(a[0], b[0], strict=True):
        assert torch.equal(x, y)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        assert a[1][name].keys() == b[1][name].keys()
        for key, x in a[1][name].items():
            y = b[1][name][key]
            assert type(x) is type(y)
            if isinstance(x, torch.Tensor):
                assert x.dtype == y.dtype, (name, key)
                assert torch.equal(x, y), (name, key)
            else:
                assert x == y, (name, key)


@pytest.mark.parametrize("name", NAMES)
def test_learns(name):
    net = Net()
    losses = train(net, make(name, net), 0, 30)
    assert sum(losses[-5:]) / 5 < losses[0] - 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_the_next_steps_are_bit_equal(name, dtype):
    net = Net(dim=128, wide=256).to(dtype)
    optimizer = make(name, net)
    train(net, optimizer, 0, 4)
    again, loaded = reloaded(net, optimizer, lambda network: make(name, network))
    train(net, optimizer, 4, 3)
    train(again, loaded, 4, 3)
    assert_bit_equal(snapshot(net, optimizer), snapshot(again, loaded))
    assert optimizer.state_bytes() == loaded.state_bytes() > 0


@pytest.mark.parametrize("name", [name for name in NAMES if "muon" in name])
def test_a_resume_with_bfloat16_products_is_bit_equal(name):
    net = Net(dim=128, wide=256)
    optimizer = make(name, net, ns_dtype="bfloat16")
    train(net, optimizer, 0, 4)
    again, loaded = reloaded(net, optimizer, lambda network: make(name, network))
    assert train(net, optimizer, 4, 3) == train(again, loaded, 4, 3)
    assert_bit_equal(snapshot(net, optimizer), snapshot(again, loaded))


@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_step_changes_nothing_but_the_count(name):
    net = Net(dim=128, wide=256)
    optimizer = make(name, net)
    train(net, optimizer, 0, 2)
    before = snapshot(net, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = net.loss(batch(2))
        loss.backward()
        net.blocks[0].up.weight.grad[0, 0] = float("nan")
        optimizer.skip_next = True
        return loss

    assert optimizer.step(closure) > 0
    assert_bit_equal(before, snapshot(net, optimizer))
    assert optimizer.skipped_steps == 1
    assert optimizer.skip_next is None
    assert optimizer.state_dict()["skipped_steps"] == 1
    train(net, optimizer, 2, 1)
    assert not torch.equal(net.norm.weight, before[0][-2]), "the step after it updates again"


@pytest.mark.parametrize("name", NAMES)
def test_a_closure_runs_with_gradients(name):
    net = Net()
    optimizer = make(name, net)
    with torch.no_grad():
        loss = optimizer.step(lambda: net.loss(batch(0)))
    assert loss.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_parameters_without_gradient_stay(name):
    net = Net()
    optimizer = make(name, net)
    net.loss(batch(0)).backward()
    net.blocks[0].up.weight.grad = None
    before = net.blocks[0].up.weight.detach().clone()
    optimizer.step()
    assert torch.equal(net.blocks[0].up.weight, before)
    assert "gpt.blocks.0.up.weight" not in optimizer.state_dict()["state"]


def test_progress_sets_rates_and_weight_decay():
    optimizer = make("adamw", Net(), weight_decay=0.2, weight_decay_schedule="first_half")
    matrices = next(g for g in optimizer.param_groups if g["name"] == "matrices")
    for step, decay in ((0, 0.2), (49, 0.2), (50, 0.0)):
        optimizer.set_progress(step, 100, lambda s, m: (s + 1) / m)
        assert matrices["lr"] == pytest.approx(0.003 * (step + 1) / 100)
        assert matrices["weight_decay"] == decay


def test_state_bytes_are_counted_from_tensors():
    net = Net()
    optimizer = make("adamw", net)
    assert optimizer.state_bytes() == 0
    train(net, optimizer, 0, 1)
    elements, tensors = sum(p.numel() for p in net.parameters()), len(list(net.parameters()))
    assert optimizer.state_bytes() == 8 * elements + 4 * tensors
    assert optimizer.state_bytes("head") == 8 * net.head.weight.numel() + 4
    groups = [g["name"] for g in optimizer.param_groups]
    assert sum(optimizer.state_bytes(g) for g in groups) == optimizer.state_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_known_before_the_first_step(name):
    net = Net(vocab=256, dim=128, wide=256)
    optimizer = make(name, net)
    planned = optimizer.planned_bytes()
    assert optimizer.state_bytes() == 0
    train(net, optimizer, 0, 1)
    assert sum(planned.values()) == optimizer.state_bytes()
    assert planned.keys() == optimizer.state_dict()["state"].keys()


def test_a_foreign_state_is_refused_by_name():
    net = Net()
    muon, adamw = make("muon", net), make("adamw", net)
    train(net, muon, 0, 1)
    with pytest.raises(UserError, match=r"gpt\.blocks\.0\.up\.weight by muon, this run's by adamw"):
        adamw.load_state_dict(muon.state_dict())
    with pytest.raises(UserError, match=r"no parameter gpt\.blocks\.2"):
        make("muon", Net(layers=3)).load_state_dict(muon.state_dict())
    with pytest.raises(UserError, match=r"parameter gpt\.blocks\.1.* lacks"):
        make("muon", Net(layers=1)).load_state_dict(muon.state_dict())
    with pytest.raises(UserError, match="needs"):
        make("muon", Net(wide=96)).load_state_dict(muon.state_dict())
    with pytest.raises(UserError, match="variance"):
        make("muon", net, normuon_beta=0.0).load_state_dict(muon.state_dict())
    with pytest.raises(UserError, match="not written by"):
        muon.load_state_dict(torch.optim.AdamW(net.parameters()).state_dict())


class Module(lightning.LightningModule):
    def __init__(self, name):
        super().__init__()
        self.gpt, self.name = Net(dim=128), name

    def training_step(self, tokens, index):
        return self.gpt.loss(tokens)

    def configure_optimizers(self):
        return make(self.name, self.gpt)

    def optimizer_step(self, epoch, index, optimizer, closure=None):
        optimizer.set_progress(self.global_step, 3, lambda s, m: 1.0)
        super().optimizer_step(epoch, index, optimizer, closure)


class SpoilSecondStep(lightning.Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen = optimizer
        if trainer.global_step == 1:
            optimizer.skip_next = True
            self.weights = [p.detach().clone() for p in module.parameters()]
        if trainer.global_step == 2:
            assert all(torch.equal(p, w) for p, w in zip(module.parameters(), self.weights, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_under_lightning_with_bf16_clipping_and_accumulation(name, tmp_path):
    module, spoil = Module(name), SpoilSecondStep()
    start = [p.detach().clone() for p in module.parameters()]
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=3,
        precision="bf16-mixed",
        gradient_clip_val=0.5,
        accumulate_grad_batches=2,
        callbacks=[spoil],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    data = torch.utils.data.DataLoader(torch.cat([batch(i) for i in range(6)]), batch_size=4)
    trainer.fit(module, data)
    assert trainer.global_step == 3
    assert spoil.seen.skipped_steps == 1
    assert all(not torch.equal(a, b) for a, b in zip(start, module.parameters(), strict=True))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = Module(name)
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["optimizer_states"][0]
    make(name, again.gpt).load_state_dict(saved)


def test_bytes_of_the_state_are_counted_when_there_are_more(monkeypatch):
    net = Net()
    optimizer = make("muon", net)
    assert optimizer.state_bytes() == 0
    counted = []
    monkeypatch.setattr("nanochat.optim.optimizer.tensor_bytes", lambda state: counted.append(state) or 4)
    for step in range(3):
        train(net, optimizer, step, 1)
        assert optimizer.state_bytes() == 4 * len(list(net.parameters()))
    assert len(counted) == len(list(net.parameters()))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.state_bytes()
    assert len(counted) == 2 * len(list(net.parameters()))
