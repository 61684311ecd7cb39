"""One place decides the device and the precision of everything that says `auto`."""

import pytest
import torch

from nanochat.device import default_precision, find_device
from nanochat.inference.cli import pick_device
from nanochat.run import settle


def machine(monkeypatch, cuda: bool, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "device", "precision"),
    [(True, True, "cuda", "bf16-mixed"), (False, True, "mps", "32-true"), (False, False, "cpu", "32-true")],
)
def test_auto(monkeypatch, cuda, mps, device, precision):
    machine(monkeypatch, cuda, mps)
    assert find_device().type == device
    assert default_precision(find_device()) == precision
    settled = settle({"trainer": {"accelerator": "auto", "precision": "auto"}, "compile": "auto"})
    assert settled["trainer"] == {"accelerator": device, "precision": precision}
    assert settled["compile"] is cuda


def test_what_is_said_stays():
    said = {"trainer": {"accelerator": "cpu", "precision": "bf16-mixed"}, "compile": True}
    assert settle(said) == said


def test_lightning_s_gpu_is_not_cuda_everywhere(monkeypatch):
    machine(monkeypatch, cuda=False, mps=True)
    settled = settle({"trainer": {"accelerator": "gpu", "precision": "auto"}, "compile": "auto"})
    assert settled["trainer"]["precision"] == "32-true"
    assert settled["compile"] is False


def test_generate_takes_the_same(monkeypatch):
    machine(monkeypatch, cuda=False, mps=False)
    assert pick_device("auto") == find_device()
