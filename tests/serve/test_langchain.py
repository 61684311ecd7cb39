"""LangChain's adapter of OpenAI's API against our server: chat, completions, embeddings."""

from __future__ import annotations

import asyncio

import pytest
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from openai import NotFoundError

MESSAGES = [("system", "the quick"), ("human", "one two three")]


def reach(served):
    return {"base_url": f"{served.url}/v1", "api_key": "none", "model": "little", "max_retries": 0}


def test_chat(served):
    chat = ChatOpenAI(**reach(served), temperature=0, max_tokens=12)
    answer = chat.invoke(MESSAGES)
    assert answer.usage_metadata["output_tokens"] == 12
    assert (answer.response_metadata["finish_reason"], answer.response_metadata["model_name"]) == ("length", "little")
    streamed = list(chat.stream(MESSAGES))
    assert "".join(chunk.content for chunk in streamed) == answer.content
    assert len(streamed) > 3
    assert asyncio.run(chat.ainvoke(MESSAGES)).content == answer.content
    stopped = chat.bind(stop=[answer.content[3:6]]).invoke(MESSAGES)
    assert stopped.content == answer.content[: answer.content.index(answer.content[3:6])]
    with pytest.raises(NotFoundError, match="no model"):
        ChatOpenAI(**{**reach(served), "model": "other"}).invoke(MESSAGES)


def test_completion(served):
    model = OpenAI(**reach(served), temperature=0, max_tokens=6)
    text = model.invoke("the quick brown")
    assert " fox jumps over".startswith(text[:10])
    assert model.batch(["the quick brown"] * 2) == [text] * 2
    assert "".join(model.stream("the quick brown")) == text


def test_embeddings(torch_server):
    """As text: without `check_embedding_ctx_length=False` the client sends tokens of OpenAI's own vocabulary."""
    model = OpenAIEmbeddings(**reach(torch_server), check_embedding_ctx_length=False)
    one, two = model.embed_documents(["the quick", "one two"])
    assert len(one) == len(two) == 256
    assert one != two
