"""Continuous batching: what a request gets does not depend on who is beside it."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from nanochat.errors import UserError
from nanochat.inference import Request, Sampling, Scheduler, TorchBackend, inference_copy
from nanochat.inference import scheduler as scheduling
from nanochat.inference.engine import generate_tokens
from nanochat.inference.slots import steady_rows
from tests.inference.helpers import SMALL, random_gpt


class Answer:
    """A request and what came of it."""

    def __init__(self, prompt, max_tokens=12, sampling=None, stop_after=None, **options):
        self.tokens, self.prompt, self.reason, self.message = [], None, None, None
        self.stop_after = stop_after
        self.request = Request(
            prompt, max_tokens, sampling or Sampling(0), on_token=self._token, on_end=self._end,
            on_prompt=lambda found: setattr(self, "prompt", found), **options,
        )  # fmt: skip

    def _token(self, token):
        self.tokens.append(token)
        return len(self.tokens) == self.stop_after

    def _end(self, reason, message):
        assert self.reason is None
        self.reason, self.message = reason, message

    @property
    def ids(self):
        return [token.id for token in self.tokens]


def run(backend, *answers):
    scheduler = Scheduler(backend)
    for answer in answers:
        scheduler.submit(answer.request)
    scheduler.run()
    return answers


@torch.no_grad()
def recompute(gpt, prompt, n):
    row = list(prompt)
    for _ in range(n):
        row.append(int(gpt(torch.tensor([row]))[0, -1].argmax()))
    return row[len(prompt) :]


def random_requests(draw, count, sampling):
    return [
        {"prompt": [draw.randrange(300) for _ in range(draw.randint(1, 30))], "max_tokens": draw.randint(1, 17),
         "sampling": sampling(draw), "seed": index}
        for index in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
def test_random_arrivals_give_the_tokens_of_recomputing_every_prefix(seed):
    """In float64, with more requests than slots, prompts of every length, and prompts read in pieces."""
    draw = random.Random(seed)
    gpt = random_gpt().double()
    scheduler = Scheduler(TorchBackend(inference_copy(gpt), slots=5))
    answers = [Answer(**options) for options in random_requests(draw, 14, lambda _: Sampling(0))]
    left = list(answers)
    piece, scheduling.PIECE = scheduling.PIECE, 7
    try:
        while left or scheduler.busy:
            while left and draw.random() < 0.4:
                scheduler.submit(left.pop(0).request)
            scheduler.step()
            assert len(scheduler.running) <= 5
    finally:
        scheduling.PIECE = piece
    for answer in answers:
        assert answer.ids == recompute(gpt, answer.request.prompt, answer.request.max_tokens)
        assert answer.reason == "length"


@pytest.mark.parametrize(
    "variant",
    [{"streams": 2, "stream_maps": "dynamic"}, {"value_embeddings": 2, "value_gate": "input"},
     {"sub_norm": True, "qk_norm": False, "tied": True}, {"softcap": 5.0, "activation": "relu2"}],
    ids=lambda variant: next(iter(variant)),
)  # fmt: skip
def test_every_kind_of_network(variant):
    gpt = random_gpt(dataclasses.replace(SMALL, **variant)).double()
    answers = run(
        TorchBackend(inference_copy(gpt), slots=2),
        *(Answer([7 * i + j for j in range(1 + 4 * i)], 8) for i in range(4)),
    )
    for answer in answers:
        assert answer.ids == recompute(gpt, answer.request.prompt, 8)


def test_in_float32_a_request_gets_bit_for_bit_what_it_gets_alone():
    """Sampled and greedy, with likelihoods: `steady_rows` keeps matrix products to one way of rounding."""
    draw = random.Random(5)
    gpt = inference_copy(random_gpt())
    kinds = [Sampling(0), Sampling(1.3, top_p=0.9), Sampling(0.9, top_k=20, repetition_penalty=1.3)]
    options = random_requests(draw, 12, lambda d: d.choice(kinds))
    together = run(TorchBackend(gpt, slots=7), *(Answer(**o, logprobs=3) for o in options))
    for answer, option in zip(together, options, strict=True):
        (alone,) = run(TorchBackend(gpt, slots=7), Answer(**option, logprobs=3))
        assert answer.tokens == alone.tokens


def test_rows_are_padded_where_few_of_them_round_otherwise(monkeypatch):
    gpt = inference_copy(random_gpt())
    assert steady_rows(gpt, 1) == 1
    linear = torch.nn.functional.linear
    for least, slots, expected in ((1, 9, 1), (3, 9, 4), (9, 12, 12), (5, 64, 8)):
        monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, n=least: linear(x, w).round() + (len(x) < n))
        assert steady_rows(gpt, slots) == expected


def test_a_slot_is_free_in_the_step_after_its_request_ends_or_is_cancelled():
    gpt = inference_copy(random_gpt())
    scheduler = Scheduler(TorchBackend(gpt, slots=2))
    long, short, third = Answer([1], 40), Answer([2], 3), Answer([3], 40)
    for answer in (long, short, third):
        scheduler.submit(answer.request)
    for _ in range(3):
        scheduler.step()
    assert (short.reason, third.tokens) == ("length", [])
    scheduler.step()
    assert len(third.tokens) == 1
    third.request.cancelled = True
    waiting = Answer([4], 2)
    scheduler.submit(waiting.request)
    scheduler.step()
    assert (third.reason, len(third.tokens), len(waiting.tokens)) == ("cancelled", 1, 1)
    fourth, gone = Answer([5], 30), Answer([6], 2)
    for answer in (fourth, gone):
        scheduler.submit(answer.request)
    gone.request.cancelled = True
    scheduler.step()
    assert gone.reason == "cancelled"  # without waiting for a slot
    scheduler.run()
    assert (fourth.reason, long.reason) == ("length", "length")


def test_short_prompts_do_not_wait_for_long_ones_nor_long_ones_for_a_stream_of_others(monkeypatch):
    """Prompts are read in turns: steps until the first token are bounded by the number of prompts beside it."""
    monkeypatch.setattr(scheduling, "PIECE", 2)
    scheduler = Scheduler(TorchBackend(inference_copy(random_gpt()), slots=3))
    long = Answer(list(range(40)), 1)
    scheduler.submit(long.request)
    scheduler.step()
    steps = []
    while long.reason is None:
        others = [Answer([5, 6], 1), Answer([7, 8, 9, 10], 1)]
        for answer in others:
            scheduler.submit(answer.request)
        begin = scheduler.steps
        while any(answer.reason is None for answer in others):
            scheduler.step()
        steps.append(scheduler.steps - begin)
    assert max(steps) <= 6  # 3 pieces of theirs, and the long one's between them
    assert scheduler.steps <= 3 * 20


def test_the_next_turn_reads_only_what_is_new():
    """The prompt of a second turn is the first, its answer, and more; float64 gives the same tokens as a fresh run."""
    gpt = random_gpt().double()
    backend = TorchBackend(inference_copy(gpt), slots=3)
    scheduler = Scheduler(backend)
    first = Answer(list(range(30)), 6)
    scheduler.submit(first.request)
    other = Answer(list(range(100, 110)), 8)
    scheduler.submit(other.request)
    scheduler.run()
    read = []
    prefill = backend.prefill
    backend.prefill = lambda slot, start, tokens, everything=False: (
        read.append(len(tokens)) or prefill(slot, start, tokens, everything)
    )
    again = [*range(30), *first.ids, 7, 8, 9]
    second = Answer(again, 6)
    scheduler.submit(second.request)
    scheduler.run()
    assert read == [4]  # the last token of an answer is not fed any more
    assert second.request.reused == 35
    assert second.ids == recompute(gpt, again, 6)
    same = Answer(again, 6)
    scheduler.submit(same.request)
    scheduler.run()
    assert read == [4, 1]
    assert same.ids == second.ids


def test_the_prompt_is_scored():
    gpt = random_gpt().double()
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    backend = TorchBackend(inference_copy(gpt), slots=2, vocab_limit=200)
    with torch.no_grad():
        expected = gpt(torch.tensor([prompt]))[0, :, :200].double().log_softmax(-1)
    for piece in (256, 3):
        scheduling.PIECE, before = piece, scheduling.PIECE
        try:
            scored, plain = run(
                backend, Answer(prompt, 1, logprobs=2, score_prompt=True), Answer([7], 2, score_prompt=True)
            )
        finally:
            scheduling.PIECE = before
        assert [token.id for token in scored.prompt] == prompt
        assert scored.prompt[0].logprob is None
        for place, token in enumerate(scored.prompt[1:]):
            assert token.logprob == pytest.approx(float(expected[place, token.id]), abs=2e-6)
            values, order = expected[place].topk(2)
            assert [i for i, _ in token.top] == order.tolist()
            assert [v for _, v in token.top] == pytest.approx(values.tolist(), abs=2e-6)
        assert scored.tokens[0].logprob == pytest.approx(float(expected[-1].max()), abs=2e-6)
        assert [token.id for token in plain.prompt] == [7]
    (nothing,) = run(backend, Answer(prompt, 0, score_prompt=True))
    assert (nothing.ids, nothing.reason, len(nothing.prompt)) == ([], "length", 8)


def test_ends():
    gpt = inference_copy(random_gpt().double())
    free = recompute(gpt, [1, 2], 12)
    stopped, cut, full = run(
        TorchBackend(gpt, slots=3),
        Answer([1, 2], 12, stop_ids=frozenset({free[5]})),
        Answer([1, 2], 12, stop_after=4),
        Answer(list(range(45)), 100),
    )
    assert (stopped.ids, stopped.reason) == (free[: free.index(free[5])], "stop")
    assert (cut.ids, cut.reason) == (free[:4], "stop")
    # the context holds 48: three tokens more are fed, and the one after them is written
    assert (len(full.ids), full.reason) == (4, "length")


def test_requests_that_cannot_be_served():
    scheduler = Scheduler(TorchBackend(inference_copy(random_gpt()), slots=1, context=16))
    for prompt, message in (([], "no tokens"), ([1] * 17, "17 tokens, and the context is 16"), ([300], "0 to 299"),
                            ([-1], "0 to 299")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            scheduler.submit(Answer(prompt).request)
    assert not scheduler.busy


def test_a_diverged_model_and_a_failing_backend_end_requests_with_an_error():
    gpt = inference_copy(random_gpt())
    backend = TorchBackend(gpt, slots=2)
    gpt.head.weight[7] = float("nan")
    bad, other = run(backend, Answer([1, 2]), Answer([3]))
    assert (bad.reason, other.reason) == ("error", "error")
    assert "diverged" in bad.message
    gpt.head.weight[7] = 0.0
    scheduler = Scheduler(backend)
    decode, backend.decode = backend.decode, lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory"))
    failed = Answer([1, 2])
    scheduler.submit(failed.request)
    scheduler.run()
    assert (failed.reason, failed.message) == ("error", "out of memory")
    backend.decode = decode
    fine = Answer([1, 2])
    scheduler.submit(fine.request)
    scheduler.run()
    assert fine.reason == "length"


def test_a_cache_beyond_memory_is_refused():
    with pytest.raises(UserError, match="--parallel"):
        TorchBackend(random_gpt(), slots=10**9)


def test_penalties_and_biases():
    """The written tokens against a plain loop over the network's logits."""
    gpt = random_gpt().double()
    sampling = Sampling(
        0, repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=0.4, logit_bias=((5, 30.0), (6, -100.0))
    )
    prompt = [1, 2, 2]
    (answer,) = run(TorchBackend(inference_copy(gpt), slots=2), Answer(prompt, 15, sampling))
    row = list(prompt)
    for _ in range(15):
        logits = gpt(torch.tensor([row]))[0, -1].detach()
        written = row[len(prompt) :]
        for token in set(row):
            logits[token] = logits[token] / 1.5 if logits[token] > 0 else logits[token] * 1.5
        for token in set(written):
            logits[token] -= 0.7 + 0.4 * written.count(token)
        logits[5] += 30
        logits[6] -= 100
        row.append(int(logits.argmax()))
    assert answer.ids == row[len(prompt) :]
    assert 5 in answer.ids


def test_generate_tokens_is_the_scheduler_with_sliding():
    gpt = inference_copy(random_gpt().double())
    (answer,) = run(TorchBackend(gpt, slots=2), Answer([1, 2, 3], 70, slide=True))
    assert answer.ids == [item[0] for item in generate_tokens(gpt, [[1, 2, 3]], 70, Sampling(0))]
    assert len(answer.ids) == 70 > SMALL.seq_len
