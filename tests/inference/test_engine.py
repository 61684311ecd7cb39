"""The KV cache changes nothing: decoding equals computing every prefix anew.

In float64, since matrix products of other shapes round otherwise, and int8 activations turn that into a step.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nanochat.errors import UserError
from nanochat.inference.engine import Decoder, generate_text, generate_tokens, inference_copy
from nanochat.inference.sampling import Sampling
from nanochat.model.bitlinear import BitLinear
from tests.inference.helpers import SMALL, ByteTokenizer, random_gpt

VARIANTS = {
    "default": {},
    "tied": {"tied": True},
    "bitnet": {"sub_norm": True, "qk_norm": False},
    "per-tensor": {"weight_block": 0, "activation_scale": "block"},
    "float": {"ternary": False, "n_kv_heads": 4},
    "softcap": {"softcap": 5.0, "activation": "relu2", "embedding_norm": False},
}


def tokens_of(gpt, prompts, n, sampling=None, **options):
    written = [[] for _ in prompts]
    for item in generate_tokens(gpt, prompts, n, sampling or Sampling(0), **options):
        for row, token in zip(written, item, strict=True):
            if token is not None:
                row.append(token)
    return written


@torch.no_grad()
def recompute(gpt, prompt, n):
    """Greedy decoding without a cache, sliding as the engine says it does."""
    row, start = list(prompt), max(0, len(prompt) - gpt.config.seq_len)
    for _ in range(n):
        if len(row) - start > gpt.config.seq_len:
            start = len(row) - gpt.config.seq_len // 2
        row.append(int(gpt(torch.tensor([row[start:]]))[0, -1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_decoding_equals_recomputing_every_prefix(name):
    gpt = random_gpt(dataclasses.replace(SMALL, **VARIANTS[name])).double()
    prompts = [[1, 2, 3, 4], [9], [7] * 20]
    ours = tokens_of(inference_copy(gpt), prompts, 25)
    assert ours == [recompute(gpt, prompt, 25) for prompt in prompts]
    # not the same token over and over, which any cache would get right
    assert len({token for row in ours for token in row}) > 3


def test_beyond_the_context_it_reads_the_last_half_again():
    gpt = random_gpt().double()
    prompts = [[5, 6, 7], list(range(SMALL.seq_len)), list(range(100, 230))]
    assert tokens_of(inference_copy(gpt), prompts, 70) == [recompute(gpt, prompt, 70) for prompt in prompts]


def test_a_batch_writes_what_its_rows_write_alone():
    gpt = inference_copy(random_gpt().double())
    prompts = [[1], [2, 3, 4, 5, 6, 7], [8, 9]]
    together = tokens_of(gpt, prompts, 60, Sampling(1.5, top_p=0.9), seed=4)
    alone = [tokens_of(gpt, [p], 60, Sampling(1.5, top_p=0.9), seed=4 + i)[0] for i, p in enumerate(prompts)]
    assert together == alone
    assert [len(row) for row in together] == [60] * 3


def test_stops_at_the_separator_and_never_draws_beyond_the_tokenizer():
    gpt = inference_copy(random_gpt().double())
    first = tokens_of(gpt, [[1, 2]], 12)[0]
    cut = tokens_of(gpt, [[1, 2], [3]], 12, stop_id=first[5])
    assert cut[0] == first[: first.index(first[5])]
    assert first[5] not in (other := recompute(gpt, [3], 12))
    assert cut[1] == other
    drawn = tokens_of(gpt, [[1]] * 4, 50, Sampling(3.0), vocab_limit=10)
    assert max(map(max, drawn)) < 10


def test_the_copy_computes_the_same_bits_and_shares_what_it_can():
    gpt = random_gpt().train()
    copy = inference_copy(gpt)
    tokens = torch.randint(0, SMALL.vocab_size, (2, 30))
    with torch.no_grad():
        assert torch.equal(copy(tokens), gpt(tokens))
        assert not torch.equal(inference_copy(gpt, "none")(tokens), gpt(tokens))
    assert copy.embedding.weight.data_ptr() == gpt.embedding.weight.data_ptr()
    assert not any(module.ternary for module in copy.modules() if isinstance(module, BitLinear))
    assert not any(parameter.requires_grad for parameter in copy.parameters())


def test_prefill_in_pieces_and_truncation():
    gpt = inference_copy(random_gpt().double())
    tokens = torch.randint(0, SMALL.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = gpt.hidden(tokens)
    decoder = Decoder(gpt, batch=2)
    pieces = [decoder.hidden(piece) for piece in tokens.split([7, 1, 5, 7], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-9, rtol=0)
    decoder.truncate(7)
    torch.testing.assert_close(decoder.hidden(tokens[:, 7:12]), whole[:, 7:12], atol=1e-9, rtol=0)
    with pytest.raises(UserError, match="longer than the 48"):
        decoder.hidden(tokens.repeat(1, 3))


def test_sampling_inside_a_training_run_leaves_no_trace():
    gpt = random_gpt().train()
    gpt(torch.randint(0, 300, (1, 8))).sum().backward()
    gradients = [p.grad.clone() for p in gpt.parameters()]
    weights = [p.detach().clone() for p in gpt.parameters()]
    state = torch.get_rng_state()
    texts = generate_text(gpt, ByteTokenizer(), ["def ", "x"], max_tokens=20, seed=3)
    assert texts == generate_text(gpt, ByteTokenizer(), ["def ", "x"], max_tokens=20, seed=3)
    assert texts != generate_text(gpt, ByteTokenizer(), ["def ", "x"], max_tokens=20, seed=4)
    assert generate_text(gpt, ByteTokenizer(), []) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert gpt.training
    assert all(p.requires_grad for p in gpt.parameters())
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, gpt.parameters(), strict=True))
    assert all(torch.equal(a, p) for a, p in zip(weights, gpt.parameters(), strict=True))
    gpt(torch.randint(0, 300, (1, 8))).sum().backward()


def test_a_prompt_without_tokens():
    with pytest.raises(UserError, match="no tokens"):
        next(generate_tokens(random_gpt(), [[1], []], 3))
