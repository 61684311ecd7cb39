"""Weights in bfloat16: rounding without a bias, float32 copies, and every optimizer with both."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from nanochat.optim import Optimizer
from nanochat.optim.rounding import Rounding, random_bits, round_at_random
from tests.optim.helpers import NAMES, Net, batch, make, reloaded

DRAWS = 4096


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_each_number_becomes_a_neighbour_and_the_mean_is_exact() -> None:
    draw = generator(1)
    values = torch.randn(96, generator=draw) * torch.logspace(-20, 20, 96)
    values[:4] = torch.tensor([1.0 + 2.0**-8, -1.0 - 2.0**-20, 3e-39, -(2.0**-30)])
    wide = values.repeat(DRAWS)
    out = torch.empty_like(wide, dtype=torch.bfloat16)
    round_at_random(wide, out, 1)
    found = out.double().view(DRAWS, -1)
    low = (values.view(torch.int32) & -65536).view(torch.float32).double()  # towards zero
    high = ((values.view(torch.int32) & -65536) + 65536).view(torch.float32).double()
    assert bool(((found == low) | (found == high)).all())
    step, share = (high - low).abs(), ((values.double() - low) / (high - low)).double()
    deviation = step * (share * (1 - share)).sqrt() / math.sqrt(DRAWS)
    assert bool(((found.mean(0) - values.double()).abs() <= 5 * deviation + 1e-50).all())
    assert bool((found[:, 0] == low[0]).any() and (found[:, 0] == high[0]).any())


def test_what_is_exact_stays_and_nothing_finite_becomes_nan() -> None:
    exact = torch.randn(5000, generator=generator(2)).bfloat16()
    exact[:4] = torch.tensor([0.0, -0.0, math.inf, -math.inf]).bfloat16()
    out = torch.empty_like(exact)
    round_at_random(exact.float(), out, 0)
    assert torch.equal(out.view(torch.int16), exact.view(torch.int16))
    round_at_random(torch.full((8,), math.nan), out[:8], 0)
    assert bool(out[:8].isnan().all())


def test_the_random_bits_are_those_of_splitmix() -> None:
    def one(seed: int, place: int) -> int:  # in unsigned numbers of 64 bits
        z = (seed + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    assert one(0, 0) == 0xE220A8397B1DCDAF  # the published generator's first number
    for seed in (0, 12345, -(2**62) - 7):
        found = random_bits(seed, 1000, 50, torch.device("cpu")).tolist()
        assert [bits % 2**64 for bits in found] == [one(seed % 2**64, 1000 + i) for i in range(50)]


def test_a_part_is_rounded_as_it_is_in_the_whole() -> None:
    wide = torch.randn(140_001, generator=generator(3))  # longer than a span
    whole = torch.empty_like(wide, dtype=torch.bfloat16)
    round_at_random(wide, whole, 5)
    for first, last in ((0, 1), (1, 7), (130_999, 131_075), (3, 140_001)):
        part = torch.empty_like(whole[first:last])
        round_at_random(wide[first:last].clone(), part, 5, first)
        assert torch.equal(part, whole[first:last])


def small(net: nn.Module) -> nn.Module:
    """The network with its matrices in bfloat16."""
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 2:
                setattr(module, name, nn.Parameter(parameter.detach().bfloat16()))
    return net


def optimizer_of(name: str, net: nn.Module, rounding: Rounding | None) -> Optimizer:
    optimizer = make(name, net)
    optimizer.rounding = rounding
    return optimizer


def gradients(net: nn.Module, step: int) -> tuple[float, list[Tensor]]:
    """Loss and gradients of the weights' values, in float32."""
    twin = Net()
    for own, parameter in zip(twin.parameters(), net.parameters(), strict=True):
        own.data.copy_(parameter)
    loss = twin.loss(batch(step))
    loss.backward()
    return loss.item(), [p.grad for p in twin.parameters()]  # type: ignore[misc]


def step_of(optimizer: Optimizer, net: nn.Module, given: list[Tensor], step: int) -> None:
    optimizer.set_progress(step, 100, lambda s, m: 1.0)
    for parameter, gradient in zip(net.parameters(), given, strict=True):
        parameter.grad = gradient.to(parameter.dtype)
    optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_master_copies_go_the_way_of_float32(name: str) -> None:
    rounded, wide = small(Net()), Net()
    for own, parameter in zip(wide.parameters(), rounded.parameters(), strict=True):
        own.data.copy_(parameter)
    mine, plain = optimizer_of(name, rounded, Rounding(0, master=True)), optimizer_of(name, wide, None)
    for step in range(4):
        given = [g.bfloat16().float() if g.ndim == 2 else g for g in gradients(rounded, step)[1]]
        step_of(mine, rounded, given, step)
        step_of(plain, wide, given, step)
    for own, parameter in zip(wide.parameters(), rounded.parameters(), strict=True):
        if parameter.dtype == torch.bfloat16:
            assert torch.equal(mine.state[parameter]["master"], own)
        assert torch.equal(parameter, own.to(parameter.dtype))


@pytest.mark.parametrize("name", NAMES)
def test_rounded_weights_learn_and_resume_to_the_last_bit(name: str) -> None:
    net = small(Net())
    optimizer = optimizer_of(name, net, Rounding(7))
    assert sum(optimizer.planned_bytes().values()) == sum(optimizer_of(name, net, None).planned_bytes().values())
    losses = []
    for step in range(12):
        if step == 6:
            other, again = reloaded(net, optimizer, lambda n: optimizer_of(name, n, Rounding(7)))  # type: ignore[arg-type]
        loss, given = gradients(net, step)
        losses.append(loss)
        step_of(optimizer, net, given, step)
    assert sum(losses[-3:]) / 3 < losses[0] - 0.1
    for step in range(6, 12):
        step_of(again, other, gradients(other, step)[1], step)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon", "lion8bit"])
def test_the_mean_over_seeds_is_the_update_of_float32(name: str) -> None:
    start = small(Net())
    wide, given = Net(), [g.bfloat16().float() for g in gradients(start, 0)[1]]
    for own, parameter in zip(wide.parameters(), start.parameters(), strict=True):
        own.data.copy_(parameter)
    step_of(optimizer_of(name, wide, None), wide, given, 0)
    count, sums = 32, [torch.zeros_like(p, dtype=torch.float64) for p in wide.parameters()]
    for seed in range(count):
        net = copy.deepcopy(start)
        step_of(optimizer_of(name, net, Rounding(seed)), net, given, 0)
        sums = [total + p.double() for total, p in zip(sums, net.parameters(), strict=True)]
    for total, own, parameter in zip(sums, wide.parameters(), start.parameters(), strict=True):
        if parameter.dtype == torch.bfloat16:
            ulp = 2.0 ** (own.double().abs().clamp_min(1e-30).log2().floor() - 7)
            z = (total / count - own.double()) / (0.5 * ulp / math.sqrt(count))
            assert z.abs().max() < 6.5
            assert abs(z.mean().item()) < 5 / math.sqrt(z.numel())


def test_random_numbers_are_those_of_seed_name_and_count() -> None:
    def weights(seed: int, steps: int = 1, skipped: bool = False) -> Tensor:
        net = small(Net())
        optimizer = optimizer_of("adamw", net, Rounding(seed))
        for step in range(steps):
            optimizer.skip_next = skipped and step == 0
            step_of(optimizer, net, [torch.full(p.shape, 1e-3) for p in net.parameters()], step)
        return torch.cat([p.detach().float().flatten() for p in net.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert torch.equal(weights(1), weights(1, steps=2, skipped=True)), "a skipped step draws nothing"
    net = small(Net())
    states = [Rounding(1).init(f"{i}", p)["rounding_seed"] for i, p in enumerate(net.parameters()) if p.ndim == 2]
    assert len(set(states)) == len(states)
