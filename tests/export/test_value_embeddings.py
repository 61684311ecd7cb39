"""Value embeddings in exported files: a lane of the stream, against the real llama.cpp and back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nanochat.checkpoint import load_run
from nanochat.errors import UserError
from nanochat.export import gguf as export
from nanochat.export import llama_cpp
from nanochat.export.gguf_reader import GGUFFile
from nanochat.export.huggingface import export_huggingface
from nanochat.export.packing import TERNARY_TYPES
from nanochat.export.read_back import import_export, read_export
from nanochat.export.verify import verify
from nanochat.model import GPT
from tests.export.conftest import BASE
from tests.export.test_gguf import LENGTH, assert_likelihood_kept, our_logits
from tests.inference.helpers import random_gpt, write_run

WIDE = replace(BASE, n_kv_heads=4, value_embeddings=1)
LANES = {
    "a lane as wide as the stream": WIDE,
    "two narrow lanes": replace(BASE, value_embeddings=2, tied=False),
    "one layer, one head": replace(BASE, value_embeddings=1, value_embedding_layers=(1,), value_embedding_width=64),
    "llama": replace(WIDE, qk_norm=False, embedding_norm=False, tied=False),
}
TERNARY = [name for name, config in LANES.items() if config.stream_width % 256 == 0]


@pytest.mark.parametrize("name", LANES)
def test_llama_cpp_computes_our_logits(name, runs, llama, corpus, tmp_path):
    run, tokens = runs(f"value embeddings: {name}", LANES[name]), corpus[-LENGTH:]
    report = export.export_gguf(run, tmp_path / "model.gguf", "f32")
    assert report.architecture == ("llama" if name == "llama" else "qwen3")
    ours = our_logits(run, tokens, "none")
    with llama_cpp.LlamaModel(report.path, context=LENGTH) as model:
        theirs = model.logits(tokens.tolist())
    assert ours.std() > 1
    assert np.abs(theirs - ours).max() <= 2e-4  # the issue asks for 5e-3
    assert (theirs.argmax(-1) == ours.argmax(-1)).sum() == LENGTH


def test_the_lane_takes_part(runs, llama, corpus, tmp_path):
    """Without it the logits are others: what the comparison above would show if the file lost it."""
    run, tokens = runs("value embeddings: a lane as wide as the stream", WIDE), corpus[-LENGTH:]
    ours = our_logits(run, tokens, "none")
    with torch.no_grad():
        for block in run.gpt.blocks:
            block.attention.value.gain.zero_()
    assert np.abs(our_logits(run, tokens, "none") - ours).max() > 0.1


@pytest.mark.parametrize("kind", TERNARY_TYPES)
@pytest.mark.parametrize("name", TERNARY)
def test_ternary_files_keep_the_likelihood(name, kind, runs, llama, corpus, tmp_path):
    run = runs(f"value embeddings: {name}", LANES[name])
    report = export.export_gguf(run, tmp_path / "model.gguf", kind)
    assert_likelihood_kept(run, report.path, corpus)


@pytest.mark.parametrize("kind", export.TYPES)
@pytest.mark.parametrize("name", LANES)
def test_read_back(name, kind, runs, tmp_path):
    """The gains are the file's float16 scales bit for bit, and an import writes the same file again."""
    run = runs(f"value embeddings: {name}", LANES[name])
    if kind in TERNARY_TYPES and name not in TERNARY:
        return
    path = export.export_gguf(run, tmp_path / "model.gguf", kind, "f32").path
    exported = read_export(path)
    for layer, block in enumerate(run.gpt.blocks):
        if block.attention.value is not None:
            gain = exported.weights[f"blocks.{layer}.attention.value.gain"]
            assert torch.equal(gain, block.attention.value.shipped_gain())
    assert torch.equal(exported.weights["value_embedding.weight"], run.gpt.value_embedding.weight)
    imported = load_run(import_export(path, tmp_path / "imported"))
    again = export.export_gguf(imported, tmp_path / "again.gguf", kind, "f32").path
    with GGUFFile(path) as first, GGUFFile(again) as second:
        assert set(first.tensors) == set(second.tensors)
        for tensor in first.tensors:
            assert first.raw(tensor) == second.raw(tensor), tensor


@pytest.mark.parametrize("name", ["two narrow lanes", "llama"])
def test_verify_and_safetensors(name, runs, llama, tmp_path):
    run = runs(f"value embeddings: {name}", LANES[name])
    assert verify(export.export_gguf(run, tmp_path / "model.gguf", "tq2_0").path, run).passed
    folder = export_huggingface(run, tmp_path / "folder").path
    assert verify(folder, run).passed


def test_gates_of_the_input_go_into_our_own_architecture(tmp_path, tokenizer_file):
    config = replace(WIDE, value_gate="input")
    folder = write_run(tmp_path / "run", random_gpt(config))
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    run = load_run(folder)
    with pytest.raises(UserError, match=r"cannot run this network: model.value_gate=input \(static is needed\)"):
        export.export_gguf(run, tmp_path / "model.gguf")
    path = export.export_gguf(run, tmp_path / "model.gguf", "tq2_0", "f32", own=True).path
    assert verify(path, run).passed
    exported = read_export(path)
    for name in ("value_embedding.weight", "blocks.1.attention.value.gate.weight"):
        assert torch.equal(exported.weights[name], run.gpt.state_dict()[name])


@pytest.mark.parametrize(
    ("config", "kind", "sentence"),
    [
        (replace(WIDE, value_embedding_width=64), "tq2_0",
         r"--type tq2_0 needs .* multiple of 256, and model.dim=256 and the lane of value embeddings "
         r"\(1 x model.value_embedding_width=64\) make 320; use --type q2_0, q4_0, f16 or f32"),
        (replace(WIDE, dim=128, n_heads=4, n_kv_heads=4), "tq2_0",
         r"--type tq2_0 needs a width that is a multiple of 256, and model.dim is 128; use"),
        (replace(WIDE, sub_norm=True, qk_norm=False, embedding_norm=False), "tq2_0",
         r"model.sub_norm=true together with model.value_embeddings=1"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_hold(config, kind, sentence, tmp_path, tokenizer_file):
    folder = write_run(tmp_path / "run", GPT(config, seed=0))
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    with pytest.raises(UserError, match=sentence):
        export.export_gguf(load_run(folder), tmp_path / "model.gguf", kind)
    assert not (tmp_path / "model.gguf").exists()
