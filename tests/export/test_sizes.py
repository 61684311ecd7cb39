"""The size that `nanochat params` and `nanochat report` promise is that of the file."""

from __future__ import annotations

import dataclasses

import pytest

from nanochat.checkpoint import Run
from nanochat.data.tokenizer import Byte
from nanochat.errors import UserError
from nanochat.export.gguf import architecture, export_gguf
from nanochat.export.gguf_reader import GGUFFile
from nanochat.export.sizes import planned_file
from nanochat.model import GPT, GPTConfig
from nanochat.objectives.mtp import MultiTokenPrediction

SMALL = GPTConfig(vocab_size=300, dim=256, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=320, seq_len=32)
VARIANTS = {
    "a tied table that the norm is folded into": {},
    "no norm on the embedding": {"embedding_norm": False},
    "a head of its own": {"tied": False},
    "a lane": {"value_embeddings": 2},
    "a lane that takes the file to another type": {"value_embeddings": 1, "value_embedding_width": 64},
    "gates of the input": {"value_embeddings": 1, "value_gate": "input"},
    "float weights": {"ternary": False},
    "streams": {"streams": 2, "stream_maps": "dynamic"},
    "norms before the outputs": {"sub_norm": True, "qk_norm": False, "embedding_norm": False},
}


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bytes_of_the_tensors(variant, heads, tmp_path):
    config = dataclasses.replace(SMALL, **VARIANTS[variant])
    Byte().build().save(tmp_path / "tokenizer.json")
    objectives = MultiTokenPrediction(config, tokens=2).state_dict() if heads else {}
    run = Run(
        tmp_path, tmp_path / "none.ckpt", GPT(config, seed=0), config, {f"mtp.{k}": v for k, v in objectives.items()}
    )
    try:
        own = not architecture(config, heads)
    except UserError:
        own = True
    kind, parts = planned_file(config, heads)
    export_gguf(run, tmp_path / "m.gguf", kind, own=own)
    with GGUFFile(tmp_path / "m.gguf") as file:
        assert sum(parts.values()) == sum(tensor.size for tensor in file.tensors.values())
        assert ("mtp heads" in parts) == ("hy_v3.nextn_predict_layers" in file.metadata or (own and heads > 0))
