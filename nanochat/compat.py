"""Private functions of other packages that nanochat uses, each with the reason; tests/test_compat.py watches them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # launching needs nothing of torch, the model nothing of the others
    from hydra.core.utils import JobReturn
    from lightning import Trainer
    from torch import Tensor


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) int8 @ b (K, N) int8 -> (M, N) int32, exact. torch has no public product of int8 matrices."""
    import torch

    return torch._int_mm(a, b)  # type: ignore[attr-defined]


def job_error(job_return: JobReturn) -> BaseException:
    """What a failed job of Hydra raised. The public `return_value` prints a line of its own, then raises it."""
    return job_return._return_value


def validate_during_fit(trainer: Trainer) -> None:
    """Run Lightning's validation loop while it fits. `Trainer.validate` would end the fit: it takes over its state,
    tears the callbacks down and leaves the module in evaluation mode."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    try:
        loop.run()
    finally:
        trainer.training = True
