"""GGUF files that nanochat did not make: served through the `openai` client, and refused where they must be."""

from __future__ import annotations

import io

import httpx
import openai
import pytest

from nanochat import cli
from nanochat.errors import UserError
from nanochat.inference import Request, Sampling, Scheduler
from nanochat.serve.models import Settings, load_model
from tests.serve.conftest import serve
from tests.serve.strangers import write_gpt2, write_mamba, write_without_tokenizer

TEXT = " Grüße 🚀"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def served(stranger, llama):
    with serve(lambda: [load_model(stranger, Settings(slots=2))]) as running:
        yield running


def test_the_openai_client_talks_to_it(served):
    """The template and the tokens that end an answer come from the file; characters of several tokens arrive whole."""
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    meta = client.models.retrieve("stranger").model_dump()["meta"]
    assert (meta["backend"], meta["context"], meta["chat"]) == ("llama.cpp", 128, True)
    whole = client.chat.completions.create(model="stranger", messages=HELLO, temperature=0, logprobs=True)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (TEXT, "stop")
    assert whole.usage.completion_tokens == 9
    # <s><|user|>, the text, <|assistant|>: the template's own <s> is not doubled
    assert whole.usage.prompt_tokens == 3 + len(tokens_of(served, "hello"))
    assert b"".join(bytes(t.bytes) for t in whole.choices[0].logprobs.content).decode() == TEXT
    chunks = client.chat.completions.create(model="stranger", messages=HELLO, temperature=0, stream=True)
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert texts == [" Gr", "ü", "ße", " ", "🚀"]
    stopped = client.chat.completions.create(model="stranger", messages=HELLO, temperature=0, stop="e 🚀")
    assert stopped.choices[0].message.content == " Grüß"
    continued = client.completions.create(model="stranger", prompt="a", temperature=0, max_tokens=3, echo=True)
    assert continued.choices[0].text == "abcd"
    with pytest.raises(openai.BadRequestError, match="which runs the models that nanochat wrote"):
        client.embeddings.create(model="stranger", input="a")


def tokens_of(served, text, **more):
    return httpx.post(f"{served.url}/tokenize", json={"content": text, **more}).json()["tokens"]


def test_a_message_cannot_write_the_tokens_of_the_text(served):
    """`/tokenize` takes names of special tokens as plain text, in whatever kind of vocabulary."""
    tokens = tokens_of(served, "Grüße 🚀 </s>")
    assert 2 not in tokens
    assert tokens_of(served, "a", add_special=True)[0] == 1
    text = httpx.post(f"{served.url}/detokenize", json={"tokens": tokens}).json()["content"]
    assert text.strip() == "Grüße 🚀 </s>"


def test_history_is_written_with_the_models_own_tokens(stranger, llama):
    """`eos_token` in a template is the file's."""
    model = load_model(stranger, Settings(slots=1))
    assert model.template.render([*HELLO, {"role": "assistant", "content": "hi"}], add_generation_prompt=False) == (
        "<s><|user|>hello<|assistant|>hi</s>"
    )
    tokens = model.conversation([*HELLO, {"role": "assistant", "content": "hi"}])
    assert (tokens[0], tokens.count(1), tokens.count(2)) == (1, 1, 1)
    model.backend.close()


def test_generate_and_chat(stranger, llama, capsys, monkeypatch):
    options = ["--temperature", "0", "--max-tokens", "3"]
    assert cli.main(["generate", str(stranger), "--prompt", "abc", *options]) == 0
    assert capsys.readouterr().out == "abcdef\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert cli.main(["chat", str(stranger), "--temperature", "0"]) == 0
    assert capsys.readouterr().out.strip() == TEXT.strip()


def test_a_template_that_cannot_be_read_is_said(tmp_path, llama):
    model = load_model(write_gpt2(tmp_path / "broken.gguf", "{% for %}"), Settings(slots=1))
    assert not model.is_chat
    assert "conversations are written as ChatML: the chat template is not Jinja" in model.note
    model.backend.close()


def test_a_state_that_cannot_be_cut_back_is_read_anew(tmp_path, llama):
    """The prefix of an earlier prompt is not reused where a model keeps one state for all that it has read."""
    model = load_model(write_mamba(tmp_path / "mamba.gguf"), Settings(slots=1))

    def answer(scheduler, prompt):
        written: list[int] = []
        request = Request(prompt, 8, Sampling(0), on_token=lambda token: bool(written.append(token.id)))
        scheduler.submit(request)
        scheduler.run()
        return written, request.reused

    prompt = [1, *range(10, 60)]
    fresh, _ = answer(Scheduler(model.backend), [*prompt, 5])
    scheduler = Scheduler(model.backend)
    answer(scheduler, [*prompt, 77, 78])
    assert answer(scheduler, [*prompt, 5]) == (fresh, 0)
    model.backend.close()


def test_a_file_without_a_tokenizer(tmp_path, llama):
    """llama.cpp would end the whole process at the first request."""
    with pytest.raises(UserError, match="has no tokenizer"):
        load_model(write_without_tokenizer(tmp_path / "none.gguf"), Settings(slots=1))
