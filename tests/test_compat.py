"""The private functions of other packages still do what nanochat takes them for."""

import torch

from nanochat import compat


def test_int8_product_is_exact():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-127, 128, (24, 512), dtype=torch.int8, generator=generator)
    b = torch.randint(-1, 2, (512, 16), dtype=torch.int8, generator=generator)
    found = compat.int8_product(a, b)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), a.long() @ b.long())
