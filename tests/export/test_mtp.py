"""Exports with the sequential heads of multi-token prediction: the trunk and every head, against llama.cpp's own."""

from __future__ import annotations

import ctypes
import dataclasses
from ctypes import POINTER, c_bool, c_float, c_int32, c_void_p

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanochat.checkpoint import load_run
from nanochat.export.gguf import export_gguf
from nanochat.export.llama_cpp import F32, NO_FLASH_ATTENTION, LlamaModel
from nanochat.export.read_back import import_export, read_export
from nanochat.export.verify import verify
from nanochat.inference.engine import inference_copy
from nanochat.model import GPT
from nanochat.model.bitlinear import BitLinear
from nanochat.objectives.mtp import MultiTokenPrediction
from nanochat.objectives.step import Step
from tests.export.conftest import BASE, VARIANTS
from tests.inference.helpers import write_run

HEADS = 2
LENGTH = 128


@torch.enable_grad()
def trained(config, corpus, steps=30):
    """A GPT with chained sequential heads after a few steps, all of them used."""
    gpt, mtp = GPT(config, seed=0), MultiTokenPrediction(config, tokens=HEADS, token_fraction=1.0)
    optimizer = torch.optim.AdamW([*gpt.parameters(), *mtp.parameters()], lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for index in range(steps):
        starts = torch.randint(len(corpus) - 66, (8,), generator=generator)
        window = torch.stack([corpus[start : start + 65] for start in starts])
        tokens, targets = window[:, :-1], window[:, 1:]
        step = Step.of(gpt, tokens, targets, step=index, max_steps=steps, micro_step=index, eot_id=0)
        loss = F.cross_entropy(gpt.logits(step.hidden).flatten(0, 1), targets.flatten()) + mtp(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return gpt, mtp


LANE = dataclasses.replace(BASE, value_embeddings=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer_file, corpus):
    return trained_run(VARIANTS["qwen3"], tmp_path_factory, tokenizer_file, corpus)


@pytest.fixture(scope="module", params=[VARIANTS["qwen3"], LANE], ids=["plain", "value embeddings"])
def either_run(request, run, tmp_path_factory, tokenizer_file, corpus):
    return run if request.param != LANE else trained_run(LANE, tmp_path_factory, tokenizer_file, corpus)


def trained_run(config, tmp_path_factory, tokenizer_file, corpus):
    gpt, mtp = trained(config, corpus)
    heads = {f"mtp.{name}": tensor for name, tensor in mtp.state_dict().items()}
    folder = write_run(tmp_path_factory.mktemp("mtp") / "run", gpt, objectives=heads)
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    run = load_run(folder)
    run.__dict__["mtp"] = mtp
    return run


class NextN:
    """llama.cpp's graph of the `nextn` blocks, through the interface that its own speculative decoding uses."""

    def __init__(self, model: LlamaModel) -> None:
        self.model, library = model, model._library

        def function(name, *arguments, result=None):
            found = getattr(library, name)
            found.argtypes, found.restype = arguments, result
            return found

        self.set_embeddings = function("_Z26llama_set_embeddings_nextnP13llama_contextbb", c_void_p, c_bool, c_bool)
        self.offset = function("_Z28llama_set_nextn_layer_offsetP13llama_contexti", c_void_p, c_int32)
        self.embedding = function(
            "_Z30llama_get_embeddings_nextn_ithP13llama_contexti", c_void_p, c_int32, result=POINTER(c_float)
        )
        self.set_embeddings(model._context, True, False)
        settings = library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 256
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = F32
        settings.flash_attn_type = NO_FLASH_ATTENTION
        settings.ctx_type, settings.ctx_other = 1, model._context
        self.context = library.llama_init_from_model(model._model, settings)
        assert self.context
        self.set_embeddings(self.context, True, True)

    def close(self) -> None:
        self.model._library.llama_free(self.context)

    def hidden(self, context, count: int, dim: int) -> np.ndarray:
        rows = [np.ctypeslib.as_array(self.embedding(context, i), (dim,)) for i in range(count)]
        return np.stack(rows)

    def logits(self, head: int, tokens: list[int], hidden: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Row i: token i with the hidden state before it, at position start + i; returns logits and hidden states."""
        library, count = self.model._library, len(tokens)
        library.llama_memory_clear(library.llama_get_memory(self.context), True)
        self.offset(self.context, head)
        batch = library.llama_batch_init(count, hidden.shape[1], 1)
        batch.n_tokens = count
        ids = (c_int32 * count)(*tokens)
        batch.token = ctypes.cast(ids, POINTER(c_int32))
        ctypes.memmove(batch.embd, np.ascontiguousarray(hidden, np.float32).ctypes.data, hidden.size * 4)
        for i in range(count):
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = start + i, 1, 0, 1
        assert library.llama_decode(self.context, batch) == 0
        found = [library.llama_get_logits_ith(self.context, i) for i in range(count)]
        result = np.stack([np.ctypeslib.as_array(row, (self.model.vocab_size,)) for row in found])
        after = self.hidden(self.context, count, hidden.shape[1])
        batch.token = None
        library.llama_batch_free(batch)
        return result, after


@torch.no_grad()
def our_heads(run, tokens):
    """Logits of the trunk and of every head, with float activations."""
    gpt, mtp = inference_copy(run.gpt, "none"), run.__dict__["mtp"]
    hidden = gpt.hidden(tokens[None])
    result = [gpt.logits(hidden)[0].numpy()]
    for i, head in enumerate(mtp.heads):
        for module in head.modules():
            if hasattr(module, "activation_scale"):
                module.activation_scale = "none"
        length = hidden.shape[1] - 1
        following = tokens[None, i + 1 : i + 1 + length]
        lane = gpt.lane(following)
        square = None if lane is None else lane.square
        hidden = head(hidden[:, :length], gpt.embed(following), gpt.cos[:length], gpt.sin[:length], square=square)
        result.append(gpt.logits(hidden)[0].numpy())
    return result


def test_llama_cpp_computes_the_trunk_and_every_head(either_run, llama, corpus, tmp_path):
    run = either_run
    report = export_gguf(run, tmp_path / "model.gguf", "f32")
    assert report.architecture == "hy_v3"
    assert any("2 heads of multi-token prediction to draft with" in note for note in report.notes)
    tokens = corpus[-LENGTH:]
    trunk, *heads = our_heads(run, tokens)
    with LlamaModel(report.path, context=256) as model:
        nextn = NextN(model)
        theirs = model.logits(tokens.tolist())
        assert np.abs(theirs - trunk).max() <= 2e-4
        assert (theirs.argmax(-1) == trunk.argmax(-1)).all()
        hidden = nextn.hidden(model._context, LENGTH, run.config.stream_width)
        for i, ours in enumerate(heads):
            rows = LENGTH - i - 1
            logits, hidden = nextn.logits(i, tokens[i + 1 :].tolist(), hidden[:rows], i + 1)
            assert ours.std() > 0.5
            assert np.abs(logits - ours).max() <= 2e-4
            assert (logits.argmax(-1) == ours.argmax(-1)).all()
        nextn.close()


def test_the_trunk_alone(run, tmp_path):
    report = export_gguf(run, tmp_path / "model.gguf", "tq2_0", mtp=False)
    assert report.architecture == "qwen3"
    assert not read_export(report.path).objectives


@pytest.mark.parametrize("kind", ["tq2_0", "q2_0", "q4_0", "f32"])
@pytest.mark.parametrize("own", [False, True])
def test_the_heads_read_back(run, kind, own, tmp_path):
    path = export_gguf(run, tmp_path / "model.gguf", kind, own=own).path
    exported = read_export(path)
    mtp = MultiTokenPrediction(run.config, tokens=HEADS)
    mtp.load_state_dict({name.removeprefix("mtp."): tensor for name, tensor in run.objectives.items()})
    again = MultiTokenPrediction(run.config, tokens=HEADS)
    imported = load_run(import_export(path, tmp_path / "again"))
    again.load_state_dict({name.removeprefix("mtp."): tensor for name, tensor in imported.objectives.items()})
    matrices = 0
    for (name, module), other in zip(mtp.named_modules(), again.modules(), strict=True):
        if isinstance(module, BitLinear):
            matrices += 1
            assert torch.equal(exported.objectives[f"mtp.{name}.weight"], module.shipped_weight())
            assert torch.equal(other.shipped_weight(), module.shipped_weight())
    assert matrices == 8 * HEADS
    assert all(torch.equal(a, b) for a, b in zip(mtp.parameters(), again.parameters(), strict=True) if a.ndim == 1)
    assert verify(path, run, length=64).passed


def test_architectures_without_a_place_for_heads(run, corpus, tmp_path):
    config = dataclasses.replace(BASE, qk_norm=False)
    other = dataclasses.replace(run, gpt=GPT(config, seed=0), config=config)
    report = export_gguf(other, tmp_path / "model.gguf", "tq2_0")
    assert report.architecture == "llama"
    assert any("left out" in note for note in report.notes)
