"""lm-eval's `local-completions` scores over HTTP what the network scores in process.

It brings pandas, pyarrow and scipy along, so it is not among the packages for development; where it is not installed,
`test_echo_and_logprobs_score_a_text` asks the server for the same.
"""

from __future__ import annotations

import pytest
import torch

from nanochat.checkpoint import load_run

PAIRS = [("the quick brown", " fox"), ("the quick brown", " dog"), ("one two", " three"), ("die", " Straße")]


def test_the_same_scores(served, run, monkeypatch):
    completions = pytest.importorskip("lm_eval.models.openai_completions", reason="pip install lm-eval runs this test")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    lm = completions.LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions", model="little", tokenizer_backend="none", max_length=256
    )
    lm.tokenizer, lm.tokenized_requests = object(), True  # tokens go over the wire; nothing else needs a tokenizer
    loaded = load_run(run)
    tokenizer = loaded.tokenizer
    requests = [((a, b), [tokenizer.eot_id, *tokenizer.encode(a)], tokenizer.encode(b)) for a, b in PAIRS]
    ours = served.engine.model.backend.name == "torch"
    for (score, greedy), (_, context, continuation) in zip(lm._loglikelihood_tokens(requests), requests, strict=True):
        with torch.no_grad():
            logits = loaded.gpt(torch.tensor([context + continuation]))[0, len(context) - 1 : -1]
        rows = logits[:, : tokenizer.vocab_size].log_softmax(-1)
        expected = sum(float(row[token]) for row, token in zip(rows, continuation, strict=True))
        # llama.cpp rounds activations by its own blocks, and keeps keys and values in float16
        assert score == pytest.approx(expected, abs=1e-4 if ours else 0.2)
        assert greedy == bool((rows.argmax(-1) == torch.tensor(continuation)).all())
