"""Speculative decoding writes what the trunk alone writes: the same tokens, or the same distribution."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from nanochat.checkpoint import load_run
from nanochat.errors import UserError
from nanochat.inference.engine import generate_tokens, inference_copy
from nanochat.inference.sampling import Sampling, draw_tokens, probabilities
from nanochat.inference.speculative import Speculator, accept, build_heads, heads_of
from nanochat.objectives.mtp import MultiTokenPrediction
from nanochat.serve import generate
from tests.inference.helpers import SMALL, random_gpt, write_run

GREEDY = Sampling(0)


def random_heads(config, count, seed=0, scale=1.0):
    mtp = MultiTokenPrediction(config, seed=seed, tokens=count)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mtp.parameters():
            if parameter.ndim == 1:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.normal_(0, scale * parameter.shape[1] ** -0.5, generator=generator)
    return mtp


def parameters_of(mtp):
    return {f"mtp.{name}": tensor for name, tensor in mtp.state_dict().items()}


def doubled(config=SMALL, count=2, seed=0):
    gpt = inference_copy(random_gpt(config, seed).double())
    return gpt, build_heads(config, parameters_of(random_heads(config, count)), torch.float64)


def plain(gpt, prompt, count, sampling, **options):
    return [item[0] for item in generate_tokens(gpt, [prompt], count, sampling, **options) if item[0] is not None]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("prompt", [[5], [1, 2, 3, 4, 5, 6, 7], list(range(48)), list(range(100, 170))])
def test_greedy_output_is_the_trunks(count, prompt):
    """Also beyond the end of the context, which is at 48 tokens."""
    gpt, heads = doubled(count=count)
    speculator = Speculator(gpt, heads)
    assert list(speculator.generate(prompt, 110, GREEDY)) == plain(gpt, prompt, 110, GREEDY)
    assert speculator.statistics.tokens == 110
    assert speculator.statistics.drafted > 50


def test_drafts_are_the_heads_over_the_whole_sequence():
    """Cached drafting against the heads applied to everything at once: wrong rows would only lower the acceptance."""
    gpt, heads = doubled(count=3)
    speculator = Speculator(gpt, heads)
    seen = []
    original = speculator._draft

    def spy(tokens, count, sampling, generator):
        drafts, guesses = original(tokens, count, sampling, generator)
        seen.append((list(tokens), drafts, guesses))
        return drafts, guesses

    speculator._draft = spy
    list(speculator.generate([3, 1, 4, 1, 5], 30, Sampling(1.5)))
    checked = 0
    with torch.inference_mode():
        for tokens, drafts, guesses in seen:
            row = torch.tensor([tokens + drafts])
            rows = len(tokens) - 1
            hidden = gpt.hidden(row[:, :rows])
            for depth, (head, guess) in enumerate(zip(heads, guesses, strict=False)):
                embedded = gpt.embed(row[:, depth + 1 : depth + 1 + rows])
                hidden = head(hidden, embedded, gpt.cos[:rows], gpt.sin[:rows])
                expected = probabilities(gpt.logits(hidden[0, -1]), Sampling(1.5))
                torch.testing.assert_close(guess, expected, atol=1e-6, rtol=0)
                checked += 1
    assert checked > 40


def test_a_perfect_head_is_always_accepted():
    """A head that says what the trunk will say: as many tokens a pass as there are drafts, and one."""
    gpt, heads = doubled(count=1)
    speculator = Speculator(gpt, heads)
    answer = plain(gpt, [1, 2, 3], 40, GREEDY)
    told = dict(enumerate([1, 2, 3, *answer]))

    def oracle(tokens, count, sampling, generator):
        guess = torch.zeros(SMALL.vocab_size, dtype=torch.float64)
        guess[told[len(tokens)]] = 1
        return ([told[len(tokens)]], [guess]) if count else ([], [])

    speculator._draft = oracle
    assert list(speculator.generate([1, 2, 3], 40, GREEDY)) == answer
    statistics = speculator.statistics
    assert (statistics.accepted, statistics.drafted, statistics.passes) == (20, 20, 20)
    assert "2.00 a pass" in str(statistics)
    assert "100%" in str(statistics)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_accepted_has_the_true_distribution(seed):
    """Pairs of tokens of a Markov chain that another chain drafts, against their probabilities (chi-square)."""
    words, count = 4, 6000
    generator = torch.Generator().manual_seed(seed)
    true, draft = (torch.rand(words, words, generator=generator, dtype=torch.float64).pow(2) for _ in range(2))
    true[0, 1] = draft[2, 3] = 0  # tokens that one of the two never draws
    true, draft = true / true.sum(1, keepdim=True), draft / draft.sum(1, keepdim=True)
    found, accepted = Counter(), 0
    for _ in range(count):
        drafts = [int(draw_tokens(draft[:1], [generator]))]
        drafts.append(int(draw_tokens(draft[drafts[0]][None], [generator])))
        new = accept(true[[0, *drafts]], drafts, [draft[0], draft[drafts[0]]], generator)
        accepted += len(new) - 1
        if len(new) == 1:  # the second token comes from the next pass
            new.append(int(draw_tokens(true[new[0]][None], [generator])))
        found[tuple(new[:2])] += 1
    exact = {(a, b): float(true[0, a] * true[a, b]) for a in range(words) for b in range(words)}
    chi = sum((found[key] - p * count) ** 2 / (p * count) for key, p in exact.items() if p)
    assert chi < 37.7  # the 0.1% point of 15 degrees of freedom
    assert not any(found[key] for key, p in exact.items() if p == 0)
    assert 0.2 < accepted / (2 * count) < 0.95


def test_generated_tokens_have_the_trunks_distribution_at_a_temperature():
    """The first two tokens at temperature 0.5, against plain sampling's probabilities (chi-square)."""
    config = dataclasses.replace(SMALL, vocab_size=8, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=16)
    gpt, heads = doubled(config, count=1)
    prompt, sampling, count = [1, 2, 3], Sampling(0.5), 1500
    words = range(config.vocab_size)
    with torch.inference_mode():
        first = probabilities(gpt(torch.tensor([prompt]))[0, -1], sampling)
        second = probabilities(gpt(torch.tensor([[*prompt, word] for word in words]))[:, -1], sampling)
    speculator = Speculator(gpt, heads)
    found = Counter(tuple(speculator.generate(prompt, 2, sampling, seed=seed)) for seed in range(count))
    assert 0.1 < speculator.statistics.accepted / speculator.statistics.drafted < 0.9
    expected = {(a, b): count * float(first[a] * second[a, b]) for a in words for b in words}
    cells = [(found[pair], e) for pair, e in expected.items() if e >= 5]
    cells.append(tuple(map(sum, zip(*((found[p], e) for p, e in expected.items() if e < 5), strict=True))))
    chi = sum((f - e) ** 2 / e for f, e in cells)
    assert chi < (len(cells) - 1) + 4 * (2 * (len(cells) - 1)) ** 0.5  # four standard deviations


def test_stops_where_plain_decoding_stops():
    gpt, heads = doubled()
    answer = plain(gpt, [1, 2, 3], 30, GREEDY)
    stop = answer[7]
    assert list(Speculator(gpt, heads).generate([1, 2, 3], 30, GREEDY, stop_id=stop)) == answer[: answer.index(stop)]
    for count in (1, 2, 3):
        assert list(Speculator(gpt, heads).generate([1, 2, 3], count, GREEDY)) == answer[:count]
    limited = list(Speculator(gpt, heads, vocab_limit=9).generate([1, 2, 3], 40, Sampling(2.0)))
    assert max(limited) < 9


def test_command(tmp_path, capsys):
    from nanochat.data.tokenizer import Byte

    config = dataclasses.replace(SMALL, seq_len=64)
    run = write_run(tmp_path / "run", random_gpt(config), objectives=parameters_of(random_heads(config, 1)))
    Byte().build().save(run / "tokenizer.json")
    options = [str(run), "--prompt", "abc", "--max-tokens", "40", "--temperature", "0"]
    assert generate.main(options) == 0
    alone = capsys.readouterr().out
    assert generate.main([*options, "--speculative"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("abc")
    assert len(output.out) > 10
    assert "passes of the trunk" in output.err
    assert output.out[:8] == alone[:8]  # float32 may round two ways later on
    without = write_run(tmp_path / "without", random_gpt(config))
    Byte().build().save(without / "tokenizer.json")
    with pytest.raises(UserError, match=r"trained without \+mtp=on"):
        generate.main([str(without), "--speculative"])


def test_heads_that_cannot_draft(tmp_path):
    parallel = MultiTokenPrediction(SMALL, kind="parallel", tokens=2)
    run = load_run(write_run(tmp_path / "run", random_gpt(), objectives=parameters_of(parallel)))
    with pytest.raises(UserError, match="not sequential"):
        heads_of(run)
    with pytest.raises(UserError, match="no heads"):
        Speculator(random_gpt(), [])
