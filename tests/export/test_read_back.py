"""What was exported reads back bit for bit, as a network and as a run; `verify` sees what is wrong with a file."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from nanochat.checkpoint import load_run
from nanochat.errors import UserError
from nanochat.export import cli, llama_cpp
from nanochat.export.gguf import export_gguf
from nanochat.export.gguf_reader import GGUFFile
from nanochat.export.huggingface import export_huggingface
from nanochat.export.read_back import import_export, latent_weight, network, read_export
from nanochat.export.verify import verify
from nanochat.inference.engine import inference_copy
from nanochat.model import GPT
from nanochat.model.bitlinear import BitLinear, dequantise, ternarise
from tests.export.conftest import BASE, VARIANTS
from tests.inference.helpers import random_gpt

TOKENS = torch.arange(3, 403, 2)[None] % 512


def shipped_matrices(gpt):
    return {n: m.shipped_weight().detach() for n, m in gpt.named_modules() if isinstance(m, BitLinear)}


def with_gpt(run, gpt):
    changed = dataclasses.replace(run, gpt=gpt, config=gpt.config)
    return changed


def export(run, path, kind):
    if kind == "safetensors":
        return export_huggingface(run, path).path
    own = kind.startswith("own-")
    return export_gguf(run, path, kind.removeprefix("own-"), "f32", own=own).path


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", ["tq2_0", "tq1_0", "q2_0", "q4_0", "f16", "f32", "own-tq2_0", "own-q2_0", "own-q4_0", "safetensors"]
)
@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name, kind, runs, tmp_path):
    run = runs(name)
    if kind == "safetensors" and name == "bitnet":
        with pytest.raises(UserError, match=r"model\.sub_norm"):
            export(run, tmp_path / "file", kind)
        return
    path = export(run, tmp_path / "file", kind)
    exported = read_export(path)
    matrices = shipped_matrices(run.gpt)
    for module, values in matrices.items():
        assert torch.equal(exported.weights[f"{module}.weight"], values)
    ours = inference_copy(run.gpt)(TOKENS)
    torch.testing.assert_close(inference_copy(network(exported))(TOKENS), ours, atol=1e-3, rtol=0)

    folder = import_export(path, tmp_path / "imported")
    again = load_run(folder)
    for module, values in shipped_matrices(again.gpt).items():
        assert torch.equal(values, matrices[module])
    assert torch.equal(inference_copy(again.gpt)(TOKENS), inference_copy(network(exported))(TOKENS))
    assert (folder / "tokenizer.json").read_bytes() == (run.folder / "tokenizer.json").read_bytes()
    assert again.config.ternary
    # an import is a run like any other: it exports to the same matrices
    second = export(with_gpt(runs(name), again.gpt), tmp_path / "second", kind)
    for module, values in matrices.items():
        assert torch.equal(read_export(second).weights[f"{module}.weight"], values)


@pytest.mark.parametrize(
    "change",
    [{"activation": "relu2", "softcap": 12.0}, {"sub_norm": True, "tied": False}, {"ternary": False}, {"dim": 96}],
)
def test_our_own_architecture_holds_every_switch(change, runs, tmp_path):
    gpt = random_gpt(dataclasses.replace(BASE, **change))
    kind = "own-tq2_0" if gpt.config.ternary and gpt.config.dim == 256 else "own-f32"
    path = export(with_gpt(runs("qwen3"), gpt), tmp_path / "file.gguf", kind)
    exported = read_export(path)
    assert exported.config == gpt.config
    with torch.no_grad():
        assert torch.equal(inference_copy(network(exported))(TOKENS), inference_copy(gpt)(TOKENS))


@pytest.mark.parametrize("block", [0, 64, 256, 300])
@pytest.mark.parametrize("spread", [1e-7, 1e-3, 1.0, 300.0])
def test_latent_weights_ternarise_to_the_same_values(block, spread):
    weight = torch.randn(40, 600, generator=torch.Generator().manual_seed(block)) * spread
    weight[3] = 0
    weight[5, :299] = 0  # a block with a single non-zero weight
    values = dequantise(*ternarise(weight, block), block)
    latent = latent_weight(values, block)
    assert torch.equal(dequantise(*ternarise(latent, block), block), values)


def test_verify_accepts_what_was_exported(runs, llama, tmp_path):
    for kind in ("tq2_0", "q2_0", "q4_0", "f32", "own-tq1_0", "safetensors"):
        run = runs("llama")
        found = verify(export(run, tmp_path / kind, kind), run, length=64)
        assert found.passed
        assert len(found.sha256) == 64
        assert len(found.comparisons) == (1 if kind in ("own-tq1_0", "safetensors") else 2)
        if kind != "safetensors":
            with GGUFFile(tmp_path / kind) as file:
                assert len(found.tensors) == len(file.tensors) == 2 + 1 + 9 * 2


def test_verify_fails_for_another_run(runs, llama, tmp_path):
    run = runs("qwen3")
    path = export(run, tmp_path / "file.gguf", "f32")
    other = with_gpt(run, GPT(BASE, seed=9))
    found = verify(path, other, length=64)
    assert not found.passed
    assert "FAIL" in str(found.comparisons[0])
    assert found.comparisons[1].passed  # llama.cpp still agrees with the file
    with pytest.raises(UserError, match="vocabulary or context"):
        verify(path, with_gpt(run, GPT(dataclasses.replace(BASE, vocab_size=600), seed=9)))


def test_verify_names_what_is_wrong(runs, tmp_path):
    import gguf

    path = export(runs("qwen3"), tmp_path / "file.gguf", "tq2_0")
    data = path.read_bytes()

    def rename(old: bytes, new: bytes):
        assert data.count(old) == 1
        path.write_bytes(data.replace(old, new))

    rename(b"blk.1.attn_v.weight", b"blk.1.attn_w.weight")
    with pytest.raises(UserError, match=r"no tensor 'blk\.1\.attn_v\.weight'"):
        verify(path)
    rename(b"qwen3.attention.head_count_kv", b"qwen3.attention.head_count_xx")
    with pytest.raises(UserError, match="head_count_kv is None instead of 2"):
        verify(path)
    path.write_bytes(data)
    editor = gguf.GGUFReader(path, "r+")
    editor.fields["qwen3.rope.freq_base"].parts[-1][0] = 5.0
    editor.data.flush()
    with pytest.raises(UserError, match=r"rope\.freq_base is 5\.0 instead of 100000"):
        verify(path)
    with GGUFFile(path) as file:
        offset = file.tensors["token_embd.weight"].offset
    path.write_bytes(data[:offset] + np.float32(np.nan).tobytes() + data[offset + 4 :])
    with pytest.raises(UserError, match="not finite"):
        verify(path)


def test_files_of_other_programs(tmp_path):
    import gguf

    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    with pytest.raises(UserError, match="not written by nanochat"):
        read_export(path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a whole exported model: it has no model\.safetensors\.$"):
        read_export(tmp_path)
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(UserError, match="is not a whole exported model: "):
        read_export(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_export(tmp_path / "missing.gguf")


def test_import_does_not_destroy(runs, tmp_path):
    run = runs("qwen3")
    path = export(run, tmp_path / "file.gguf", "tq2_0")
    folder = import_export(path, tmp_path / "deep" / "imported")
    with pytest.raises(UserError, match="--force"):
        import_export(path, folder)
    assert import_export(path, folder, force=True) == folder
    (folder / "metrics.csv").write_text("step\n")
    with pytest.raises(UserError, match="not an imported model"):
        import_export(path, folder, force=True)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["imported"]


def test_safetensors_folder(runs, tmp_path):
    run = runs("qwen3")
    out = tmp_path / "hf"
    report = export_huggingface(run, out)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    assert config["tie_word_embeddings"] is False  # the embedding norm was folded into one of the two
    assert {p.name for p in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert report.size == sum(p.stat().st_size for p in out.iterdir())
    with pytest.raises(UserError, match="--force"):
        export_huggingface(run, out)
    assert verify(export_huggingface(run, out, "f16", force=True).path, run).passed
    (tmp_path / "precious").mkdir()
    with pytest.raises(UserError, match="not an exported model"):
        export_huggingface(run, tmp_path / "precious", force=True)
    with pytest.raises(UserError, match="choose f32 or f16"):
        export_huggingface(run, tmp_path / "x", "tq2_0")


def test_commands(runs, monkeypatch, capsys, tmp_path):
    run = runs("qwen3")
    folder = shutil.copytree(run.folder, tmp_path / "run")
    assert cli.export_main([str(folder)]) == 0
    output = capsys.readouterr().out
    assert "model-tq2_0.gguf: qwen3, tq2_0" in output
    assert "stock llama.cpp" in output
    path = folder / "model-tq2_0.gguf"
    assert cli.verify_main([str(path), "--run", str(folder), "--tensors"]) == 0
    output = capsys.readouterr().out
    assert "blk.1.ffn_down.weight" in output
    assert "ok    structure" in output
    assert cli.import_main([str(path), "--out", str(tmp_path / "again")]) == 0
    assert cli.verify_main([str(path), "--run", str(tmp_path / "again")]) == 0
    assert cli.export_main([str(folder), "--to", "nanochat", "--type", "tq1_0"]) == 0
    assert "runs in nanochat only" in capsys.readouterr().out
    assert cli.export_main([str(folder), "--to", "safetensors"]) == 0
    assert cli.verify_main([str(folder / "huggingface"), "--run", str(folder)]) == 0
    with pytest.raises(UserError, match="--embedding-type"):
        cli.export_main([str(folder), "--to", "safetensors", "--embedding-type", "f16"])
    with pytest.raises(UserError, match=r"--checkpoint 9 names a step of a run folder, and .* is a file"):
        cli.export_main([str(path), "--checkpoint", "9"])
    monkeypatch.setattr(llama_cpp, "load", lambda: (_ for _ in ()).throw(llama_cpp.LlamaCppUnavailable("gone")))
    assert cli.verify_main([str(path)]) == 0
    assert "not compared with llama.cpp: gone" in capsys.readouterr().out
