"""Lion against its definition in float64."""

import torch

from tests.optim.helpers import only, single


def by_hand(weight, gradients, lr, wd):
    momentum = torch.zeros_like(weight, dtype=torch.float64)
    weight = weight.double()
    for gradient in gradients.double():
        update = torch.sign(0.9 * momentum + 0.1 * gradient)
        weight = weight - lr * (update + wd * weight)
        momentum = 0.99 * momentum + 0.01 * gradient
    return weight


def test_is_its_definition():
    torch.manual_seed(0)
    start, gradients = torch.randn(8, 9), torch.randn(10, 8, 9)
    optimizer = single(start.clone(), "lion", 0.01, weight_decay=0.3)
    for gradient in gradients:
        only(optimizer).grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(only(optimizer).double(), by_hand(start, gradients, 0.01, 0.3), rtol=0, atol=1e-6)


def test_8_bits_are_its_definition_under_a_constant_gradient():
    """The update is then the gradient's sign, whatever the codes lose."""
    torch.manual_seed(0)
    start, gradient = torch.randn(64, 128), torch.randn(64, 128)
    optimizer = single(start.clone(), "lion8bit", 0.01, weight_decay=0.3)
    for _ in range(3):
        only(optimizer).grad = gradient.clone()
        optimizer.step()
    expected = by_hand(start, gradient.expand(3, 64, 128), 0.01, 0.3)
    torch.testing.assert_close(only(optimizer).double(), expected, rtol=0, atol=1e-5)
