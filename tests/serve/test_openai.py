"""The real `openai` client against every endpoint, on both backends."""

from __future__ import annotations

import asyncio
import base64
import struct

import httpx
import openai
import pytest
import torch

from nanochat.checkpoint import load_run

PROMPT = "the quick brown"


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client, **options):
    return client.completions.create(**{"model": "little", "prompt": PROMPT, "temperature": 0, **options})


def chat(client, text="one two three", **options):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(
        **{"model": "little", "messages": messages, "temperature": 0, "max_tokens": 12, **options}
    )


def test_models(client, served):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("little", "model", "nanochat")
    meta = model.model_dump()["meta"]
    assert (meta["context"], meta["slots"], meta["chat"]) == (256, 8, False)
    assert client.models.retrieve("little") == model
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.models.retrieve("other")


def test_completion_whole_and_streamed(client):
    whole = complete(client, max_tokens=20)
    (choice,) = whole.choices
    assert choice.text.startswith(" fox jumps over")
    assert (choice.finish_reason, choice.logprobs, choice.index) == ("length", None, 0)
    assert whole.usage.completion_tokens == 20
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 20
    chunks = list(complete(client, max_tokens=20, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == choice.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 20
    assert len(chunks) > 5


def test_default_of_sixteen_tokens_and_the_end_of_a_document(client):
    assert complete(client).usage.completion_tokens == 16
    assert complete(client, max_tokens=0).choices[0].text == ""
    banned = complete(client, max_tokens=4, logit_bias={"0": 100})
    assert (banned.choices[0].text, banned.choices[0].finish_reason) == ("", "stop")


def test_stop_strings_span_tokens(client):
    free = complete(client, max_tokens=60).choices[0].text
    for stop in (free[5:9], ["never", free[17:30]], [free[3:5], free[4:20]]):
        first = min(free.find(one) for one in ([stop] if isinstance(stop, str) else stop) if one in free)
        whole = complete(client, max_tokens=60, stop=stop).choices[0]
        assert (whole.text, whole.finish_reason) == (free[:first], "stop")
        chunks = complete(client, max_tokens=60, stop=stop, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == free[:first]


def test_several_prompts_and_answers(client):
    reply = complete(client, prompt=["one two", "die", "the quick"], n=2, max_tokens=8, temperature=0.7, seed=3)
    assert [choice.index for choice in reply.choices] == list(range(6))
    again = complete(client, prompt=["one two", "die", "the quick"], n=2, max_tokens=8, temperature=0.7, seed=3)
    assert [c.text for c in reply.choices] == [c.text for c in again.choices]
    alone = [complete(client, prompt="die", max_tokens=8, temperature=0.7, seed=3 + i).choices[0].text for i in (0, 1)]
    assert [c.text for c in reply.choices[2:4]] == alone
    texts = [""] * 6
    for chunk in complete(
        client, prompt=["one two", "die", "the quick"], n=2, max_tokens=8, temperature=0.7, seed=3, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [c.text for c in reply.choices]
    assert reply.usage.completion_tokens == 48


def test_echo_and_logprobs_score_a_text(client, run):
    """As lm-eval asks: likelihoods of the prompt against the network itself."""
    text = "the quick brown fox. die Straße 🚀"
    reply = complete(client, prompt=text, echo=True, logprobs=2, max_tokens=1)
    found = reply.choices[0].logprobs
    assert reply.choices[0].text.startswith(text)
    loaded = load_run(run)
    ids = loaded.tokenizer.encode(text)
    with torch.no_grad():
        row = torch.tensor([[loaded.tokenizer.eot_id, *ids]])
        logprobs = loaded.gpt(row)[0, :, : loaded.tokenizer.vocab_size].log_softmax(-1)
    expected = [float(logprobs[i, token]) for i, token in enumerate(ids)]
    assert len(found.token_logprobs) == len(ids) + 1
    assert found.token_logprobs[:-1] == pytest.approx(expected, abs=0.3)
    assert sum(found.token_logprobs[:-1]) == pytest.approx(sum(expected), rel=0.02)
    best = [max(top.values()) for top in found.top_logprobs[:-1]]
    assert best == pytest.approx(logprobs.max(-1).values[:-1].tolist(), abs=0.3)
    assert found.text_offset[0] == 0
    assert found.text_offset == sorted(found.text_offset)
    # tokens instead of text: nothing is put before them, so the first has no likelihood
    by_token = complete(client, prompt=[loaded.tokenizer.eot_id, *ids], echo=True, logprobs=1, max_tokens=0).choices[0]
    assert by_token.logprobs.token_logprobs[0] is None
    assert by_token.logprobs.token_logprobs[1:] == pytest.approx(found.token_logprobs[:-1], abs=1e-5)
    plain = complete(client, prompt=text, echo=True, max_tokens=3).choices[0]
    streamed = complete(client, prompt=text, echo=True, max_tokens=3, logprobs=1, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == plain.text


def test_chat_whole_and_streamed(client):
    whole = chat(client)
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert len({(chunk.id, chunk.created, chunk.object) for chunk in chunks}) == 1
    first = chunks[0].choices[0].delta
    assert (first.role, first.content) == ("assistant", "")
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:-1])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == choice.message.content
    assert chunks[-2].choices[0].finish_reason == choice.finish_reason
    assert chunks[-1].usage == whole.usage or chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    parts = chat(client, [{"type": "text", "text": "one two"}, {"type": "text", "text": " three"}])
    assert parts.choices[0].message.content == choice.message.content


def test_chat_logprobs_and_limits_of_length(client):
    reply = chat(client, logprobs=True, top_logprobs=3, max_tokens=None, max_completion_tokens=5)
    content = reply.choices[0].logprobs.content
    assert len(content) == reply.usage.completion_tokens <= 5
    for entry in content:
        assert entry.logprob == pytest.approx(max(top.logprob for top in entry.top_logprobs))  # greedy
        assert len(entry.top_logprobs) == 3
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == reply.choices[0].message.content


def test_a_characters_bytes_arrive_together(client):
    """🚀 is four tokens here."""
    pieces = [
        chunk.choices[0].text
        for chunk in complete(client, prompt="the lazy dog. die Straße führt über", max_tokens=20, stream=True)
    ]
    assert "🚀" in "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)


def test_embeddings(served, client):
    if served.engine.model.backend.name != "torch":
        with pytest.raises(openai.BadRequestError, match="--backend torch"):
            client.embeddings.create(model="little", input="a")
        return
    reply = client.embeddings.create(model="little", input=["the quick", "one two three", "one two"])
    vectors = torch.tensor([item.embedding for item in reply.data])
    near, far = torch.cosine_similarity(vectors[1], vectors[2], 0), torch.cosine_similarity(vectors[1], vectors[0], 0)
    assert near > far
    packed = httpx.post(f"{served.url}/v1/embeddings", json={"input": "the quick", "encoding_format": "base64"}).json()[
        "data"
    ][0]["embedding"]
    values = base64.b64decode(packed)
    assert struct.unpack(f"<{len(values) // 4}f", values) == pytest.approx(vectors[0].tolist())


def test_tokenize_and_detokenize(served):
    text = "Straße 🚀 <|endoftext|>"
    tokens = httpx.post(f"{served.url}/tokenize", json={"content": text}).json()["tokens"]
    assert httpx.post(f"{served.url}/detokenize", json={"tokens": tokens}).json() == {"content": text}
    assert 0 not in tokens
    special = httpx.post(f"{served.url}/tokenize", json={"content": text, "add_special": True}).json()["tokens"]
    assert special == [0, *tokens]


def test_health_and_metrics(served, client):
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    complete(client, max_tokens=5)
    served.idle()
    text = httpx.get(f"{served.url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['nanochat_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert float(values['nanochat_tokens_total{kind="answer",model="little"}']) >= 5
    assert float(values['nanochat_slots{model="little"}']) == 8
    assert float(values['nanochat_requests_running{model="little"}']) == 0
    assert float(values['nanochat_time_to_first_token_seconds_count{model="little"}']) >= 1


def test_the_next_turn_is_read_from_the_cache(client):
    messages = [{"role": "user", "content": "one two three four five six seven eight nine ten. " * 2}]
    first = client.chat.completions.create(model="little", messages=messages, temperature=0, max_tokens=8)
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "die"}]
    second = client.chat.completions.create(model="little", messages=messages, temperature=0, max_tokens=8)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_sixty_four_streams_each_equal_their_single_run(served):
    """On eight slots, with random lengths, through the asynchronous client."""
    prompts = [f"{'the quick brown fox jumps one two three four die Straße'[i % 7 :][: 4 + i]}" for i in range(64)]

    async def stream(client, prompt, length):
        chunks = await client.completions.create(
            model="little", prompt=prompt, max_tokens=length, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def everything():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            lengths = [4 + (7 * i) % 11 for i in range(64)]
            together = await asyncio.gather(*map(stream, [client] * 64, prompts, lengths))
            alone = [await stream(client, p, n) for p, n in zip(prompts, lengths, strict=True)]
            return together, alone

    together, alone = asyncio.run(everything())
    assert together == alone
    assert all(together)
