"""The same tokens from both backends, and what each loads."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from nanochat.checkpoint import load_run
from nanochat.data.tokenizer import BPE
from nanochat.errors import UserError
from nanochat.export.gguf import export_gguf
from nanochat.inference import Request, Sampling, Scheduler
from nanochat.serve.models import Settings, cached_gguf, load_model
from tests.inference.helpers import write_run
from tests.serve.conftest import CONFIG, TEXT, train

PROMPTS = ["the quick", "one two three", "die", "over the lazy dog. die Straße", "seven eight", "\n"]


def answers(model, prompts, count=24, **options):
    """Greedy answers of several prompts at once, as tokens."""
    scheduler, found = Scheduler(model.backend), []
    for prompt in prompts:
        tokens = []
        found.append(tokens)
        ids = [*model.codec.begin, *model.codec.encode(prompt)]
        scheduler.submit(
            Request(ids, count, Sampling(0), on_token=lambda t, tokens=tokens: tokens.append(t.id), **options)
        )
    scheduler.run()
    return found


@pytest.fixture(scope="module")
def models(run, llama):
    """ours, llama.cpp from the run, llama.cpp from a file"""
    ours, theirs = (load_model(run, Settings(name, slots=3)) for name in ("torch", "llama.cpp"))
    file = load_model(cached_gguf(load_run(run)), Settings(slots=3))
    yield ours, theirs, file
    for model in (ours, theirs, file):
        model.backend.close()


def test_both_backends_write_the_same_tokens(models):
    """Greedy, six requests on three slots, against each alone on a fresh slot of ours."""
    ours, theirs, file = models
    expected = [answers(ours, [prompt])[0] for prompt in PROMPTS]
    assert "brown fox jumps over" in ours.codec.decode(expected[0])
    for model in (ours, theirs, file):
        assert answers(model, PROMPTS) == expected
    assert (ours.backend.name, theirs.backend.name, file.backend.name) == ("torch", "llama.cpp", "llama.cpp")


def test_their_likelihoods_agree(models):
    scored = []
    for model in models:
        prompt = [*model.codec.begin, *model.codec.encode("the quick brown fox jumps over the lazy dog")]
        scheduler = Scheduler(model.backend)
        scheduler.submit(Request(prompt, 1, logprobs=1, score_prompt=True, on_prompt=scored.append))
        scheduler.run()
    for others in scored[1:]:
        for ours, theirs in zip(scored[0][1:], others[1:], strict=True):
            assert ours.id == theirs.id
            assert ours.logprob == pytest.approx(theirs.logprob, abs=0.2)


def test_codecs_agree(models):
    ours, _, file = models
    for text in ("the quick", "Straße 🚀", "  a\n\nb\t", "<|endoftext|>", ""):
        tokens = ours.codec.encode(text)
        assert file.codec.encode(text) == tokens
        assert file.codec.decode(tokens) == ours.codec.decode(tokens) == text
        assert [file.codec.piece(t) for t in tokens] == [ours.codec.piece(t) for t in tokens]
    assert file.codec.encode("<|endoftext|>", special=True) == [0]
    assert (file.codec.begin, file.codec.stop_ids) == (ours.codec.begin, ours.codec.stop_ids) == ([0], {0})
    for codec in (ours.codec, file.codec):
        assert codec.piece(10**6) == b""
        with pytest.raises(UserError, match="surrogate"):
            codec.encode("\ud800")


def test_a_prefix_is_reused_in_llama_cpp_too(models):
    for model in models:
        begin = [*model.codec.begin, *model.codec.encode("the quick brown fox jumps over the lazy dog. die " * 3)]
        scheduler, out = Scheduler(model.backend), []
        first = Request(begin, 8, Sampling(0), on_token=lambda t, out=out: out.append(t.id))
        scheduler.submit(first)
        scheduler.run()
        written = list(out)
        again = Request([*begin, *written[:-1]], 1, Sampling(0), on_token=lambda t, out=out: out.append(t.id))
        scheduler.submit(again)
        scheduler.run()
        assert again.reused == len(begin) + 6
        assert out[-1] == written[-1]


def test_the_cached_file_follows_the_checkpoint(run, llama, tmp_path):
    folder = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(folder / "serve", ignore_errors=True)
    first = cached_gguf(load_run(folder))
    stamp = first.stat().st_mtime_ns
    assert cached_gguf(load_run(folder)) == first
    assert first.stat().st_mtime_ns == stamp
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    second = cached_gguf(load_run(folder))
    assert second != first
    assert not first.exists()
    model = load_model(second, Settings(slots=1))
    assert model.is_chat
    assert model.template.render([{"role": "user", "content": "hi"}]) == "hi!"
    model.backend.close()


def test_what_llama_cpp_cannot_run_falls_to_ours(run, llama, tmp_path):
    folder = shutil.copytree(run, tmp_path / "copy")
    values = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**values, "softcap": 15.0}))
    model = load_model(folder, Settings("auto", slots=1))
    assert model.backend.name == "torch"
    assert "model.softcap=15" in model.note
    with pytest.raises(UserError, match=r"model\.softcap=15"):
        load_model(folder, Settings("llama.cpp"))


def test_a_run_folder_that_cannot_be_written(run, llama, tmp_path):
    folder = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(folder / "serve", ignore_errors=True)
    (folder / "serve").write_text("in the way")
    path = cached_gguf(load_run(folder))
    assert folder not in path.parents
    model = load_model(folder, Settings("auto", slots=1))
    assert model.backend.name == "llama.cpp"
    model.backend.close()


def test_value_embeddings_and_a_width_that_only_another_type_fits(llama, tmp_path):
    """A lane of value embeddings, and matrices of q2_0: llama.cpp writes what ours writes."""
    tokenizer = BPE(vocab_size=300).build([TEXT])
    for name, changes in (("lane", {"value_embeddings": 1}), ("narrow", {"dim": 128, "n_heads": 2})):
        gpt = train(dataclasses.replace(CONFIG, weight_block=128 if name == "narrow" else 256, **changes), tokenizer)
        folder = write_run(tmp_path / name, gpt)
        tokenizer.save(folder / "tokenizer.json")
        ours, theirs = (load_model(folder, Settings(backend, slots=2)) for backend in ("torch", "llama.cpp"))
        assert answers(ours, PROMPTS[:4], 12) == answers(theirs, PROMPTS[:4], 12)
        theirs.backend.close()


def test_our_own_files(run, tmp_path):
    path = tmp_path / "own.gguf"
    export_gguf(load_run(run), path, "tq2_0", "f32", own=True)
    model = load_model(path, Settings("auto", slots=2))
    ours = load_model(run, Settings("torch", slots=2))
    assert model.backend.name == "torch"
    assert answers(model, PROMPTS[:2]) == answers(ours, PROMPTS[:2])
    assert torch.equal(model.backend.embed([1, 2]), ours.backend.embed([1, 2]))


def test_what_cannot_be_loaded(run, tmp_path, llama):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    for path, settings, message in (
        (tmp_path / "none.gguf", Settings(), "there is no file"),
        (tmp_path / "bad.gguf", Settings(), "not a whole GGUF file"),
        (tmp_path / "none", Settings(), "there is no run"),
        (run, Settings("cuda"), "--backend cuda"),
        (run, Settings(context=10**6), "--context 1000000"),
        (run, Settings("torch", slots=10**9), "--parallel"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(path, settings)
