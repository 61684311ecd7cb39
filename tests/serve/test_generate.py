"""`nanochat generate` from a run or a file to the terminal."""

from __future__ import annotations

import io

import pytest

from nanochat import cli
from nanochat.checkpoint import Run, load_run
from nanochat.errors import UserError
from nanochat.export import llama_cpp
from nanochat.export.gguf import export_gguf
from nanochat.serve import generate
from nanochat.serve.models import Settings, load_model
from tests.inference.helpers import ByteTokenizer, random_gpt, write_run


@pytest.fixture
def random_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "tokenizer", ByteTokenizer())
    return str(write_run(tmp_path / "run", random_gpt()))


def test_writes_the_prompt_and_a_repeatable_continuation(random_run, capsys):
    outputs = []
    for seed in (1, 1, 2):
        assert generate.main([random_run, "--prompt", "Grüße ", "--seed", str(seed), "--max-tokens", "40"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("Grüße ")
    assert outputs[0] == outputs[1] != outputs[2]


def test_several_continuations_are_those_of_their_seeds(random_run, capsys):
    generate.main([random_run, "--prompt", "a", "--count", "3", "--seed", "5", "--max-tokens", "15"])
    several = capsys.readouterr().out
    for seed in (5, 6, 7):
        generate.main([random_run, "--prompt", "a", "--seed", str(seed), "--max-tokens", "15"])
        assert f"(seed {seed}) ---\n{capsys.readouterr().out}" in several


def test_a_prompt_from_standard_input_longer_than_the_context(random_run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 100))
    assert generate.main([random_run, "--prompt", "-", "--max-tokens", "60", "--temperature", "0"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("x" * 100)
    assert "sees the last 48" in output.err


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--count", "0"], "--count"), (["--max-tokens", "0"], "--max-tokens"), (["--top-p", "2"], "--top-p"),
     (["--device", "cuda:99"], "--device cuda:99"), (["--device", "nonsense"], "--device nonsense"),
     (["--checkpoint", "3"], "step=3")],
)  # fmt: skip
def test_bad_options(random_run, options, message):
    with pytest.raises(UserError, match=message):
        generate.main([random_run, *options])


def test_a_tokenizer_of_another_model(random_run, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 400)
    with pytest.raises(UserError, match="do not belong together"):
        generate.main([random_run])


@pytest.fixture(scope="module")
def files(run, tmp_path_factory):
    """One run in every type of file that its widths fit."""
    folder = tmp_path_factory.mktemp("files")
    kinds = ("tq2_0", "tq1_0", "q2_0", "q4_0", "f16", "f32", "nanochat")
    for kind in kinds:
        export_gguf(
            load_run(run), folder / f"{kind}.gguf", "tq2_0" if kind == "nanochat" else kind, own=kind == "nanochat"
        )
    return {kind: folder / f"{kind}.gguf" for kind in kinds}


QUESTION = ["--prompt", "the quick", "--max-tokens", "20", "--temperature", "0"]


def written(capsys, path, *words) -> str:
    assert cli.main(["generate", str(path), *QUESTION, *words]) == 0
    return capsys.readouterr().out


def test_every_type_of_file_says_what_its_run_says(run, files, capsys, llama):
    expected = written(capsys, run)
    assert expected.startswith("the quick brown fox jumps over")
    for kind, path in files.items():
        assert written(capsys, path) == expected, kind
        if kind != "nanochat":
            assert written(capsys, path, "--backend", "llama.cpp") == expected, kind
    assert written(capsys, run, "--backend", "llama.cpp") == expected


def test_chat_takes_every_type_of_file(files, capsys, monkeypatch, llama):
    answers = set()
    for path in files.values():
        for backend in ("torch", "auto"):
            monkeypatch.setattr("sys.stdin", io.StringIO("the quick\n"))
            options = ["--temperature", "0", "--max-tokens", "8", "--backend", backend]
            assert cli.main(["chat", str(path), *options]) == 0
            answers.add(capsys.readouterr().out)
    assert len(answers) == 1


def test_auto_takes_our_engine_for_generate_and_llama_cpp_for_serve(run, files, llama):
    for path in (run, files["tq2_0"]):
        for own_first, name in ((True, "torch"), (False, "llama.cpp")):
            model = load_model(path, Settings(slots=1, own_first=own_first))
            assert (model.backend.name, model.note) == (name, "")
            model.backend.close()


def test_without_llama_cpp(files, stranger, capsys, monkeypatch):
    """Our own files run in our engine; a file of another program is refused, by all three commands."""

    def none():
        raise llama_cpp.LlamaCppUnavailable("llama.cpp is not here: fetch it.")

    monkeypatch.setattr(llama_cpp, "load", none)
    assert written(capsys, files["tq2_0"]).startswith("the quick brown fox")
    assert "not here" in load_model(files["tq2_0"], Settings(slots=1)).note
    for verb in ("generate", "chat", "serve"):
        assert cli.main([verb, str(stranger), *(["--port", "0"] if verb == "serve" else [])]) == 2
        error = capsys.readouterr().err
        assert error.splitlines()[-1].endswith(
            "was not written by nanochat, so it needs llama.cpp: llama.cpp is not here: fetch it."
        )
    for options, message in (
        (["--backend", "torch"], "llama.cpp alone can run it"),
        (["--checkpoint", "3"], "--checkpoint 3 names a step of a run folder"),
        (["--speculate", "on"], "was not written by nanochat"),
    ):
        assert cli.main(["generate", str(stranger), *options]) == 2
        assert message in capsys.readouterr().err


def test_a_file_of_ours_that_neither_backend_runs(files, tmp_path, monkeypatch):
    """Both reasons are given."""
    damaged = tmp_path / "damaged.gguf"
    data = files["f32"].read_bytes()
    damaged.write_bytes(data.replace(b"token_embd.weight", b"token_embX.weight"))
    with pytest.raises(UserError, match=r"^with llama\.cpp: .*; with torch: .*"):
        load_model(damaged, Settings(slots=1))
