"""The optimizer state of a run that an earlier version saved."""

from pathlib import Path

import pytest
import torch

from nanochat.errors import UserError
from nanochat.training.module import NanoChatModule

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "saved_run" / "run" / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def checkpoint():
    return torch.load(CHECKPOINT, weights_only=True)


def optimizer_of(checkpoint, **changes):
    cfg = checkpoint["hyper_parameters"]["cfg"]
    cfg = {key: node for key, node in cfg.items() if key != "collider"}  # its class has moved; it owns no parameters
    return NanoChatModule({**cfg, "optim": {**cfg["optim"], **changes}}).configure_optimizers()


def test_it_loads_bit_for_bit(checkpoint):
    saved = checkpoint["optimizer_states"][0]
    assert "ns_dtype" not in str(saved["groups"])
    optimizer = optimizer_of(checkpoint)
    optimizer.load_state_dict(saved)
    found = optimizer.state_dict()
    assert found["state"].keys() == saved["state"].keys()
    for name, state in saved["state"].items():
        for key, value in state.items():
            assert type(found["state"][name][key]) is type(value)
            if isinstance(value, torch.Tensor):
                assert found["state"][name][key].dtype == value.dtype
                assert torch.equal(found["state"][name][key], value)
            else:
                assert found["state"][name][key] == value
    assert {group["rule"]: group.get("ns_dtype") for group in found["groups"]} == {
        "adamw": None,
        "adamw8bit": None,
        "muon8bit": "float32",
    }


def test_other_blocks_are_refused(checkpoint):
    with pytest.raises(UserError, match="block_size=2048"):
        optimizer_of(checkpoint, block_size=1024).load_state_dict(checkpoint["optimizer_states"][0])
