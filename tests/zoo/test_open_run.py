"""A run argument may be a GGUF file or zoo:NAME, and gives the network, tokenizer and template that were exported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from nanochat.cli import main
from nanochat.errors import UserError
from nanochat.export import llama_cpp
from nanochat.export.gguf import export_gguf
from nanochat.export.open_run import open_run
from nanochat.inference.engine import inference_copy
from nanochat.model.bitlinear import BitLinear, dequantise, ternarise
from nanochat.serve.models import Settings, load_model
from tests.zoo.conftest import TEMPLATE


def no_llama_cpp():
    raise llama_cpp.LlamaCppUnavailable("it is not here.")


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
def test_the_network_comes_back_exactly(run_folder, tmp_path, kind):
    run = open_run(run_folder)
    path = export_gguf(run, tmp_path / "model.gguf", kind, "f32").path
    back = open_run(path)
    theirs = dict(back.gpt.named_modules())
    seen = 0
    for name, module in run.gpt.named_modules():
        if isinstance(module, BitLinear):
            grid = (module.block, module.scale_format)
            ours = dequantise(*ternarise(module.weight, *grid), module.block)
            other = theirs[name].weight
            assert isinstance(other, torch.Tensor)
            assert torch.equal(dequantise(*ternarise(other, *grid), module.block), ours), name
            seen += 1
    assert seen == 14
    state, original = back.gpt.state_dict(), run.gpt.state_dict()
    for name in ("value_embedding.weight", "head.weight", "blocks.1.attention.q_norm.weight"):
        assert torch.equal(state[name], original[name]), name
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        ours, theirs_logits = (inference_copy(r.gpt)(tokens) for r in (run, back))
    assert (ours - theirs_logits).abs().max() < 2e-3  # the embedding norm is folded, gains are rounded
    assert ours.std() > 0.1


def test_tokenizer_and_template_come_back(run_folder, tmp_path):
    run = open_run(run_folder)
    back = open_run(export_gguf(run, tmp_path / "model.gguf", "tq2_0").path)
    text = "def g(y):\n    return [y, 'é']\n"
    assert back.tokenizer.encode(text) == run.tokenizer.encode(text)
    assert back.tokenizer.eot_id == run.tokenizer.eot_id
    assert (back.folder / "tokenizer.json").read_text() == (run.folder / "tokenizer.json").read_text()
    assert (back.folder / "chat_template.jinja").read_text() == TEMPLATE
    assert back.meta["step"] == 7


def test_a_file_is_exported_again_to_the_same_tensors(run_folder, tmp_path, monkeypatch):
    from nanochat.export.gguf_reader import GGUFFile

    first = export_gguf(open_run(run_folder), tmp_path / "first.gguf", "tq1_0").path
    monkeypatch.chdir(tmp_path)
    assert main(["export", "first.gguf", "--type", "tq2_0"]) == 0
    with GGUFFile(first) as one, GGUFFile(tmp_path / "model-tq2_0.gguf") as two:
        assert one.metadata["general.name"] == two.metadata["general.name"]
        for name in one.tensors:
            if one.tensors[name].type != "Q8_0":
                assert (one.array(name) == two.array(name)).all(), name


def test_zoo_name_works_wherever_a_run_is_taken(added, run_folder, zoo, capsys, monkeypatch):
    shutil.copytree(added, zoo / "small")
    assert main(["generate", "zoo:small", "--prompt", "def ", "--max-tokens", "4", "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("def ")
    assert main(["export", "zoo:small", "--type", "q2_0", "--out", "again.gguf"]) == 0
    assert main(["verify", "zoo:small", "--run", str(run_folder)]) == 0
    assert main(["verify", "again.gguf", "--run", "zoo:small"]) == 0
    assert main(["import", "zoo:small"]) == 0
    assert (Path("outputs") / "imported-small" / "checkpoints" / "last.ckpt").is_file()
    monkeypatch.setattr(llama_cpp, "load", no_llama_cpp)
    model = load_model("zoo:small", Settings(slots=1))
    assert model.is_chat
    assert model.name == "small"
    assert "not with llama.cpp" in model.note


@pytest.mark.parametrize("name", ["zoo:smal", "zoo:", "zoo:../small", "zoo:/etc", "zoo:small/../small"])
def test_a_wrong_name_is_one_sentence(added, zoo, name, capsys):
    shutil.copytree(added, zoo / "small")
    for verb in ("generate", "export", "chat", "verify"):
        assert main([verb, name]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_damaged_model_is_refused(added, zoo, capsys):
    shutil.copytree(added, zoo / "small")
    weights = zoo / "small" / "small.gguf"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["generate", "zoo:small"]) == 2
    assert "damaged" in capsys.readouterr().err


def test_a_foreign_gguf_file_is_refused(tmp_path):
    path = tmp_path / "other.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 60)
    with pytest.raises(UserError):
        open_run(path)
