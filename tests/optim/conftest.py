import pytest
import torch


@pytest.fixture(autouse=True)
def newton_schulz_in_float32(monkeypatch):
    """Machines differ in what `ns_dtype=auto` is; a test of bfloat16 says so."""
    monkeypatch.setattr("nanochat.optim.rules.muon.matmul_dtype", lambda device: torch.float32)
