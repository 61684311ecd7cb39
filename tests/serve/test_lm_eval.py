"""lm-eval's `local-completions` scores over HTTP what the network scores in process.

lm-eval itself is not among the packages for development: it brings 30 others, 600 MB (pandas, pyarrow, scipy, ...). The
client here sends what version 0.4.13 sends, and reads the answer as that does.
"""

from __future__ import annotations

import httpx
import pytest
import torch

from nanochat.checkpoint import load_run

PAIRS = [("the quick brown", " fox"), ("the quick brown", " dog"), ("one two", " three"), ("die", " Straße")]


def ask(url: str, batch: list[list[int]]) -> dict:
    """The request of a batch of contexts with their continuations, as token ids."""
    body = {"model": "little", "prompt": batch, "temperature": 0, "max_tokens": 1, "logprobs": 1}
    body |= {"seed": 1234, "echo": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers={"Authorization": "Bearer none"}, timeout=60)
    answer.raise_for_status()
    return answer.json()


def read(answer: dict, contexts: list[int]) -> list[tuple[float, bool]]:
    """(log likelihood, whether it is the greedy one) of each continuation; contexts: tokens before it.

    The last token is the one that was generated, since a server may refuse to generate none.
    """
    scores = []
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    for choice, start in zip(choices, contexts, strict=True):
        own = choice["logprobs"]["token_logprobs"][start:-1]
        likeliest = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][start:-1]]
        scores.append((sum(own), own == likeliest))
    return scores


@pytest.mark.parametrize("size", [1, len(PAIRS)])
def test_the_same_scores(served, run, size):
    loaded = load_run(run)
    tokenizer = loaded.tokenizer
    parts = [([tokenizer.eot_id, *tokenizer.encode(a)], tokenizer.encode(b)) for a, b in PAIRS]
    scores = []
    for start in range(0, len(parts), size):
        batch = parts[start : start + size]
        scores += read(ask(served.url, [a + b for a, b in batch]), [len(a) for a, _ in batch])
    ours = served.engine.model.backend.name == "torch"
    for (score, greedy), (context, continuation) in zip(scores, parts, strict=True):
        with torch.no_grad():
            logits = loaded.gpt(torch.tensor([context + continuation]))[0, len(context) - 1 : -1]
        rows = logits[:, : tokenizer.vocab_size].log_softmax(-1)
        expected = sum(float(row[token]) for row, token in zip(rows, continuation, strict=True))
        # llama.cpp rounds activations by its own blocks, and keeps keys and values in float16
        assert score == pytest.approx(expected, abs=1e-4 if ours else 0.2)
        assert greedy == bool((rows.argmax(-1) == torch.tensor(continuation)).all())
    assert len({greedy for _, greedy in scores}) == 2
