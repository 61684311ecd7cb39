"""What ends a run from outside, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.errors import UserError
from nanochat.run import train
from nanochat.run_folder import read_summary
from nanochat.training.failures import LostDeviceError, in_words
from nanochat.training.module import NanoChatModule
from tests.runs import configure, read_state
from tests.training.callbacks.short_runs import BARE

PLAIN: dict[str, Any] = {
    "data": {"batch_size": 8, "seq_len": 256}, "trainer": {"accumulate_grad_batches": 2}, "loss": {"chunk": None},
    "optim": {"groups": {"matrices": {"rule": "muon"}}},
}  # fmt: skip
LOST = [
    "CUDA error: unspecified launch failure",
    "CUDA error: uncorrectable ECC error encountered",
    "NCCL error in: ProcessGroupNCCL.cpp, unhandled system error",
    "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)",
    "[gloo/transport/tcp/pair.cc] Connection closed by peer [10.0.0.2]:3244",
    "Wait timeout",
]


@pytest.mark.parametrize("text", LOST)
def test_a_device_that_is_gone_may_come_back(text: str) -> None:
    error = in_words(RuntimeError(text), PLAIN, 40, "outputs/latest/checkpoints/last.ckpt")
    assert isinstance(error, LostDeviceError)
    assert error.exit_code == 75
    assert "after step 40" in str(error)
    assert "resume from outputs/latest/checkpoints/last.ckpt with ckpt_path=auto." in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        KeyError("NCCL"),
    ],
)
def test_mistakes_in_the_code_stay_what_they_are(error: Exception) -> None:
    assert in_words(error, PLAIN, 1, None) is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_full_memory_names_what_to_lower(error: Exception) -> None:
    found = in_words(error, PLAIN, 3, None)
    assert found is not None
    assert found.exit_code == 2
    for part in ("in step 4", "data.batch_size=4 trainer.accumulate_grad_batches=4", "activation_checkpointing=block",
                 "loss.chunk=64", "optim=muon8bit", "data.seq_len=128"):  # fmt: skip
        assert part in str(found)
    used = {**PLAIN, "activation_checkpointing": "block", "loss": {"chunk": 64}, "data": {"batch_size": 1},
            "optim": {"groups": {"matrices": {"rule": "muon8bit"}}}}  # fmt: skip
    assert str(in_words(error, used, 3, None)) == "the memory is full in step 4: choose a smaller model."
    on_gpu = {**used, "trainer": {"accelerator": "cuda"}}
    assert "offload_optimizer=true" in str(in_words(error, on_gpu, 3, None))
    assert "choose a smaller model" in str(in_words(error, {**on_gpu, "offload_optimizer": True}, 3, None))


def test_a_run_whose_gpu_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, step = tmp_path, NanoChatModule.training_step

    def training_step(module: NanoChatModule, *args: Any) -> Any:
        if module.global_step == 3:
            raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be ...")
        return step(module, *args)

    with monkeypatch.context() as patch:
        patch.setattr(NanoChatModule, "training_step", training_step)
        with pytest.raises(UserError, match=r"after step 3 \(CUDA error: unspecified .*last\.ckpt with ckpt_path=auto"):
            train(configure(place, BARE), place / "lost")
    assert read_summary(place / "lost")["status"] == "failed"
    assert read_state(place / "lost")["global_step"] == 2
    train(configure(place, [*BARE, "ckpt_path=auto"]), place / "lost")
    assert read_state(place / "lost")["global_step"] == 5
