"""GGUF files against the real llama.cpp, and against the weights that training used."""

from __future__ import annotations

import ctypes
import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanochat.data.tokenizer import Byte
from nanochat.errors import UserError
from nanochat.export import gguf as export
from nanochat.export import llama_cpp
from nanochat.export.gguf_reader import GGUFFile
from nanochat.export.packing import BLOCK, BLOCK_BYTES, NUMBERS, TERNARY_TYPES, pack, pack_q2_0, pack_q4_0, unpack
from nanochat.export.vocabulary import read_vocabulary
from nanochat.inference.engine import inference_copy
from nanochat.model import GPTConfig
from nanochat.model.bitlinear import dequantise, ternarise
from tests.export.conftest import BASE, VARIANTS
from tests.export.nasty import NASTY_STRINGS
from tests.inference.helpers import random_gpt

LENGTH = 256


@torch.no_grad()
def our_logits(run, tokens, activation_scale):
    return inference_copy(run.gpt, activation_scale)(tokens[None])[0].numpy()


def mean_nll(logits, tokens):
    return float(F.cross_entropy(torch.from_numpy(logits[:-1]), tokens[1:]))


def assert_likelihood_kept(run, path, corpus):
    """llama.cpp gives the file's text the likelihood that the run does, within 0.5%."""
    ours, theirs = [], []
    with llama_cpp.LlamaModel(path, context=LENGTH) as model:
        for window in corpus[-4 * LENGTH :].split(LENGTH):
            ours.append(mean_nll(our_logits(run, window, "token"), window))
            theirs.append(mean_nll(model.logits(window.tolist()), window))
    assert np.mean(theirs) == pytest.approx(np.mean(ours), rel=5e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_llama_cpp_computes_our_logits(name, runs, llama, corpus, tmp_path):
    run, tokens = runs(name), corpus[-LENGTH:]
    report = export.export_gguf(run, tmp_path / "model.gguf", "f32")
    assert report.architecture == name
    ours = our_logits(run, tokens, "none")
    with llama_cpp.LlamaModel(report.path, context=LENGTH) as model:
        theirs = model.logits(tokens.tolist())
    assert ours.std() > 1
    # the issue asks for 5e-3; 1e-5 was measured
    assert np.abs(theirs - ours).max() <= 2e-4
    assert (theirs.argmax(-1) == ours.argmax(-1)).sum() == LENGTH


@pytest.mark.parametrize("kind", TERNARY_TYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_quantised_files_keep_the_likelihood(name, kind, runs, llama, corpus, tmp_path):
    run = runs(name)
    report = export.export_gguf(run, tmp_path / "model.gguf", kind)
    assert_likelihood_kept(run, report.path, corpus)


@pytest.mark.parametrize("kind", export.TYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_file_holds_exactly_the_trained_weights(name, kind, runs, tmp_path):
    run = runs(name)
    config = run.config
    report = export.export_gguf(run, tmp_path / "model.gguf", kind)
    with GGUFFile(report.path) as file:
        for layer, block in enumerate(run.gpt.blocks):
            for target, linear, heads in (
                ("attn_q", block.attention.q, config.n_heads),
                ("attn_k", block.attention.k, config.n_kv_heads),
                ("attn_v", block.attention.v, 0),
                ("attn_output", block.attention.o, 0),
                ("ffn_gate", block.feedforward.gate, 0),
                ("ffn_up", block.feedforward.up, 0),
                ("ffn_down", block.feedforward.down, 0),
            ):
                expected = linear.shipped_weight().detach().numpy()
                if heads and name == "llama":
                    half = config.head_dim // 2
                    order = [h * 2 * half + i + j * half for h in range(heads) for i in range(half) for j in (0, 1)]
                    expected = expected[order]
                stored = file.array(f"blk.{layer}.{target}.weight")
                rows, cols = expected.shape
                assert np.array_equal(stored[:rows, :cols], expected)
                assert not stored[rows:].any()
                assert not stored[:, cols:].any()
        width = 512 if kind.startswith("tq") else 384
        assert file.metadata[f"{name}.feed_forward_length"] == width
        assert file.tensors["blk.0.ffn_down.weight"].shape == (256, width)
        assert ("output.weight" in file.tensors) == (name != "bitnet")


def test_a_padded_sub_norm_normalises_as_before(runs, tmp_path):
    run = runs("bitnet")
    norm, width = run.gpt.blocks[0].feedforward.sub_norm, run.config.ffn_dim
    with GGUFFile(export.export_gguf(run, tmp_path / "model.gguf", "tq2_0").path) as file:
        gain = torch.from_numpy(file.array("blk.0.ffn_sub_norm.weight"))
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    padded = F.rms_norm(F.pad(x, (0, len(gain) - width)), gain.shape, gain, norm.eps)
    torch.testing.assert_close(padded[:, :width], norm(x).detach(), atol=1e-5, rtol=1e-5)
    assert not padded[:, width:].any()


def test_tq2_0_stores_the_trained_scales_bit_for_bit(runs, tmp_path):
    run = runs("qwen3")
    _, scales = ternarise(run.gpt.blocks[0].attention.v.weight.detach())
    with GGUFFile(export.export_gguf(run, tmp_path / "model.gguf", "tq2_0").path) as file:
        blocks = np.frombuffer(file.raw("blk.0.attn_v.weight"), np.uint8).reshape(128, -1, 66)
    stored = np.ascontiguousarray(blocks[..., 64:]).view("<f2")[..., 0]
    assert np.array_equal(stored, scales.numpy().astype(np.float16))


@pytest.mark.parametrize("seed", range(3))
def test_q4_0_against_the_library(seed):
    import gguf

    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(seed)) * 10.0 ** -(seed * 2)
    weight[2, :256] = 0
    values = dequantise(*ternarise(weight)).numpy()
    packed = pack_q4_0(values)
    assert packed.shape == (6, 512 // 32 * 18)
    assert np.array_equal(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_0), values)


@pytest.mark.parametrize("seed", range(3))
def test_q2_0_against_llama_cpp(seed, llama):
    """Its own dequantiser reads our bytes, and ours reads every byte as it does."""
    base = ctypes.CDLL(str(llama_cpp.find() / "libggml-base.so"))
    base.dequantize_row_q2_0.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)

    def theirs(packed):
        packed, out = np.ascontiguousarray(packed), np.zeros(packed.size // 18 * 64, np.float32)
        base.dequantize_row_q2_0(packed.ctypes.data, out.ctypes.data, out.size)
        return out.reshape(len(packed), -1)

    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(seed)) * 10.0 ** -(seed * 2)
    weight[2, :256] = 0
    for block in (64, 256, 0):
        values = dequantise(*ternarise(weight, block), block).numpy()
        packed = pack_q2_0(values)
        assert packed.shape == (6, 512 // 64 * 18)
        assert np.array_equal(theirs(packed), values)
    noise = np.random.default_rng(seed).integers(0, 256, (5, 36), dtype=np.uint8)
    noise[:, [1, 19]] &= 0x7B  # finite scales
    assert np.array_equal(unpack(noise, "q2_0"), theirs(noise))


def test_the_types_numbers_and_sizes_are_llama_cpp_s(llama):
    base = ctypes.CDLL(str(llama_cpp.find() / "libggml-base.so"))
    base.ggml_type_name.restype, base.ggml_type_size.restype = ctypes.c_char_p, ctypes.c_size_t
    base.ggml_blck_size.restype = ctypes.c_int64
    for name, number in NUMBERS.items():
        assert base.ggml_type_name(number).decode() == name
        assert (base.ggml_blck_size(number), base.ggml_type_size(number)) == (BLOCK[name], BLOCK_BYTES[name])


@pytest.mark.parametrize("kind", export.TYPES)
def test_llama_cpp_names_the_type(kind, runs, llama, tmp_path):
    path = export.export_gguf(runs("qwen3"), tmp_path / "model.gguf", kind).path
    with llama_cpp.LlamaModel(path, context=LENGTH) as model:
        assert kind.upper().replace("F32", "all F32") in model.describe()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, "tq2_0"),
        ({"dim": 192}, "q2_0"),
        ({"dim": 160}, "q4_0"),
        ({"dim": 200}, "f16"),
        ({"ternary": False}, "f16"),
        ({"weight_block": 64}, "q2_0"),
        ({"weight_block": 32}, "q4_0"),
        ({"weight_block": 0}, "tq2_0"),
        ({"weight_block": "row"}, "tq2_0"),
    ],
)
def test_the_type_that_auto_takes(change, kind):
    assert export.default_type(dataclasses.replace(BASE, **change)) == kind


def test_packing_refuses_what_it_would_change():
    values = np.linspace(-1, 1, 512, dtype=np.float32).reshape(1, -1)
    for kind in (*TERNARY_TYPES, "f16"):
        with pytest.raises(UserError, match="exactly"):
            pack(values, kind, exact=True)
    with pytest.raises(UserError, match="multiples of 256"):
        pack(values[:, :300], "tq2_0", exact=True)
    with pytest.raises(UserError, match="too large"):
        pack(values * 1e6, "f16", exact=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu2"}, "model.activation=relu2"),
        ({"softcap": 15.0}, "model.softcap=15.0"),
        ({"streams": 4}, "mhc.streams=4"),
        ({"sub_norm": True}, "model.qk_norm=true"),
        ({"sub_norm": True, "qk_norm": False}, "model.embedding_norm=false"),
        ({"sub_norm": True, "qk_norm": False, "embedding_norm": False, "tied": False}, "model.tied=true"),
        ({"softcap": 15.0, "activation": "relu2"}, "relu2.*softcap"),
    ],
)
def test_names_the_switch_that_llama_cpp_cannot_run(change, message):
    with pytest.raises(UserError, match=message):
        export.architecture(dataclasses.replace(BASE, **change))


@pytest.mark.parametrize(
    ("change", "kind", "embedding", "message"),
    [
        ({"dim": 192}, "tq2_0", "f16", "model.dim is 192; use --type q2_0, q4_0, f16 or f32"),
        ({"dim": 200}, "q4_0", "f16", "model.dim is 200; use --type f16 or f32"),
        ({"dim": 200}, "f16", "q8_0", "--embedding-type q8_0.*model.dim is 200"),
        ({"weight_block": 64}, "tq1_0", "q8_0", "model.weight_block is 64"),
        ({"ternary": False}, "tq2_0", "q8_0", "model.ternary=false"),
        ({"dim": 200}, "tq2_0", "q8_0", "--type tq2_0 needs a width"),  # the type first: the rest follows from it
        ({}, "q8_0", "q8_0", "--type q8_0 is unknown"),
        ({}, "f32", "tq2_0", "--embedding-type tq2_0 is unknown"),
    ],
)
def test_names_the_option_that_does_not_fit(change, kind, embedding, message):
    with pytest.raises(UserError, match=message):
        export.check_type(dataclasses.replace(BASE, **change), kind, embedding)


@pytest.mark.parametrize(
    "change",
    [{"weight_block": 0}, {"weight_block": "row"}, {"weight_block": 512, "ffn_dim": 700}, {"weight_block": 32}],
)
def test_other_grids_that_fit(change, runs, llama, tmp_path):
    config = GPTConfig(**{**vars(BASE), **change})
    gpt = random_gpt(config)
    run = dataclasses.replace(runs("qwen3"), gpt=gpt, config=config)
    kind = "q4_0" if config.weight_block == 32 else "tq1_0"
    report = export.export_gguf(run, tmp_path / "model.gguf", kind, "f32")
    with GGUFFile(report.path) as file:
        stored = file.array("blk.1.ffn_down.weight")[:, : config.ffn_dim]
        assert np.array_equal(stored, gpt.blocks[1].feedforward.down.shipped_weight().detach().numpy())
    tokens = torch.arange(50)
    with llama_cpp.LlamaModel(report.path, context=LENGTH) as model:
        assert np.corrcoef(model.logits(tokens.tolist()).ravel(), our_logits(run, tokens, "token").ravel())[0, 1] > 0.99


def test_tokens_are_llama_cpps(runs, llama, tmp_path):
    run = runs("qwen3")
    report = export.export_gguf(run, tmp_path / "model.gguf", "tq1_0")
    assert len(set(NASTY_STRINGS)) >= 100
    with llama_cpp.LlamaModel(report.path, vocab_only=True) as model:
        for text in NASTY_STRINGS:
            ids = run.tokenizer.encode(text)
            assert model.tokenize(text) == ids, repr(text)
            assert b"".join(map(model.piece, ids)).decode() == text
        assert model.tokenize("a", add_special=True) == [run.tokenizer.eot_id, *run.tokenizer.encode("a")]
        assert model.vocab_size == run.config.vocab_size


def test_metadata(runs, tmp_path):
    run = runs("qwen3")
    (run.folder / "summary.json").write_text(
        json.dumps({"metrics": {"val/bpb": 1.25}, "command": "python train.py", "commit": "abc"})
    )
    report = export.export_gguf(run, tmp_path / "m.gguf", "tq2_0", name="Tiny", licence="MIT")
    with GGUFFile(report.path) as file:
        keys = file.metadata
    assert keys["general.name"] == "Tiny"
    assert keys["general.license"] == "MIT"
    assert keys["nanochat.val_bpb"] == 1.25
    assert (keys["nanochat.command"], keys["nanochat.commit"]) == ("python train.py", "abc")
    assert "1.2500 bits per byte" in keys["general.description"]
    assert GPTConfig.from_dict(json.loads(keys["nanochat.config"])) == run.config
    types = keys["tokenizer.ggml.token_type"]
    assert (types[0], types[1], types[-1]) == (3, 1, 5)
    assert keys["tokenizer.ggml.tokens"][-1] == "[PAD511]"
    assert report.size == report.path.stat().st_size
    assert any("stored once more" in note for note in report.notes)
    assert any("384 is padded with zeros to 512" in note for note in report.notes)


def test_an_existing_file_is_kept_and_a_failure_leaves_nothing(runs, tmp_path, monkeypatch):
    run, path = runs("qwen3"), tmp_path / "model.gguf"
    path.write_text("precious")
    with pytest.raises(UserError, match="--force"):
        export.export_gguf(run, path)
    broken = dataclasses.replace(run)
    monkeypatch.setattr(export, "pack", lambda *_: (_ for _ in ()).throw(UserError("no")))
    with pytest.raises(UserError, match=r"token_embd\.weight: no"):
        export.export_gguf(broken, path, force=True)
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    assert export.export_gguf(run, path, force=True).size > 1000
    with pytest.raises(UserError, match="no folder"):
        export.export_gguf(run, tmp_path / "missing" / "m.gguf")
    with pytest.raises(UserError, match="is a folder"):
        export.export_gguf(run, tmp_path)


def test_a_diverged_model_is_refused(runs, tmp_path):
    run = runs("qwen3")
    run.gpt.embedding.weight.data[3, 3] = float("nan")
    with pytest.raises(UserError, match=r"token_embd\.weight: .*not finite"):
        export.export_gguf(run, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_a_byte_tokenizer(llama, runs, tmp_path):
    run = dataclasses.replace(runs("qwen3"), folder=tmp_path)
    Byte().build().save(tmp_path / "tokenizer.json")
    report = export.export_gguf(run, tmp_path / "model.gguf", "tq1_0")
    with llama_cpp.LlamaModel(report.path, vocab_only=True) as model:
        for text in NASTY_STRINGS:
            assert model.tokenize(text) == run.tokenizer.encode(text), repr(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "pre-tokenizer that llama.cpp does not know"),
        (lambda d: d.update(normalizer={"type": "NFC"}), "normalizer"),
        (lambda d: d["model"].update(type="Unigram"), "byte-level BPE"),
        (lambda d: d["model"]["vocab"].update(far=512), "more than the model's vocabulary of 512"),
        (lambda d: d.pop("model"), "not a tokenizer"),
    ],
)
def test_tokenizers_that_llama_cpp_cannot_have(change, message, tokenizer_file, tmp_path):
    document = json.loads(tokenizer_file.read_text())
    change(document)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=message):
        read_vocabulary(path, 512, 0)
