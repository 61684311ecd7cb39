import pytest
import torch
from torch import nn

from tests.optim.helpers import Net, batch, make, only, single


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_is_torch_adamw(weight_decay):
    ours, theirs = Net(), Net()
    optimizer = make("adamw", ours, lr=0.01, weight_decay=weight_decay)
    for group in optimizer.param_groups:
        group["base_weight_decay"] = weight_decay
    oracle = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    for step in range(20):
        factor = 1 / (step + 1)
        optimizer.set_progress(step, 20, lambda s, m, factor=factor: factor)
        oracle.param_groups[0]["lr"] = 0.01 * factor
        for net, opt in ((ours, optimizer), (theirs, oracle)):
            opt.zero_grad()
            net.loss(batch(step)).backward()
            opt.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_bfloat16_parameters_keep_32_bit_moments():
    torch.manual_seed(0)
    start, gradients = torch.randn(40, 30), torch.randn(5, 40, 30).bfloat16()
    optimizer = single(start.bfloat16(), "adamw", 0.01)
    reference = nn.Parameter(start.bfloat16().float())
    oracle = torch.optim.AdamW([reference], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for gradient in gradients:
        only(optimizer).grad = gradient.clone()
        reference.grad = gradient.float()
        optimizer.step()
        oracle.step()
        reference.data.copy_(reference.data.bfloat16())
    state = optimizer.state[only(optimizer)]
    assert {k: v.dtype for k, v in state.items()} == dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), torch.float32)
    torch.testing.assert_close(state["exp_avg"], oracle.state[reference]["exp_avg"])
    torch.testing.assert_close(only(optimizer).float(), reference.data, rtol=0.01, atol=1e-6)
