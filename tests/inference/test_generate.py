"""`nanochat generate` from a run folder to the terminal."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.checkpoint import Run
from nanochat.errors import UserError
from nanochat.inference import TextStream, cli
from tests.inference.helpers import ByteTokenizer, random_gpt, write_run

DECODE = ByteTokenizer().decode


@given(st.lists(st.binary(min_size=1, max_size=5), max_size=30))
def test_streamed_text_is_the_decoded_text(pieces):
    """Tokens of arbitrary bytes: what streams out is final at once and equals decoding the whole."""
    stream = TextStream(lambda tokens: b"".join(pieces[t] for t in tokens).decode(errors="replace"))
    shown = ""
    whole = b"".join(pieces).decode(errors="replace")
    for token in range(len(pieces)):
        shown += stream.push(token)
        assert whole.startswith(shown)
    assert shown + stream.finish() == whole


def test_a_character_of_four_tokens_appears_whole():
    stream = TextStream(DECODE)
    assert [stream.push(byte) for byte in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "tokenizer", ByteTokenizer())
    return str(write_run(tmp_path / "run", random_gpt()))


def test_writes_the_prompt_and_a_repeatable_continuation(run, capsys):
    outputs = []
    for seed in (1, 1, 2):
        assert cli.main([run, "--prompt", "Grüße ", "--seed", str(seed), "--max-tokens", "40"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("Grüße ")
    assert outputs[0] == outputs[1] != outputs[2]


def test_several_continuations_are_those_of_their_seeds(run, capsys):
    cli.main([run, "--prompt", "a", "--count", "3", "--seed", "5", "--max-tokens", "15"])
    several = capsys.readouterr().out
    for seed in (5, 6, 7):
        cli.main([run, "--prompt", "a", "--seed", str(seed), "--max-tokens", "15"])
        assert f"(seed {seed}) ---\n{capsys.readouterr().out}" in several


def test_a_prompt_from_standard_input_longer_than_the_context(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 100))
    assert cli.main([run, "--prompt", "-", "--max-tokens", "60", "--temperature", "0"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("x" * 100)
    assert "sees the last 48" in output.err


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--count", "0"], "--count"), (["--max-tokens", "0"], "--max-tokens"), (["--top-p", "2"], "--top-p"),
     (["--device", "cuda:99"], "--device cuda:99"), (["--device", "nonsense"], "--device nonsense"),
     (["--checkpoint", "3"], "step=3")],
)  # fmt: skip
def test_bad_options(run, options, message):
    with pytest.raises(UserError, match=message):
        cli.main([run, *options])


def test_a_tokenizer_of_another_model(run, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 400)
    with pytest.raises(UserError, match="do not belong together"):
        cli.main([run])


def test_a_gguf_file_is_for_the_commands_that_serve():
    with pytest.raises(
        UserError, match=r"generate reads runs; for a GGUF file use nanochat chat a/b\.gguf, or nanochat serve"
    ):
        cli.main(["a/b.gguf"])
