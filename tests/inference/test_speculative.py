"""Speculative decoding writes what the network writes without drafts: the same tokens, greedily or sampled."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from nanochat.checkpoint import load_run
from nanochat.data.tokenizer import Byte
from nanochat.errors import UserError
from nanochat.export.gguf import export_gguf
from nanochat.inference import Request, Sampling, Scheduler, TorchBackend, inference_copy, speculative
from nanochat.inference import scheduler as scheduling
from nanochat.inference.speculative import Drafter, build_heads, drafting_backend, relative_cost
from nanochat.objectives.mtp import MultiTokenPrediction
from nanochat.serve import generate
from nanochat.serve.models import Settings, load_model
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


def network(dtype=torch.float64, count=2, config=SMALL):
    gpt = inference_copy(random_gpt(config).to(dtype))
    return gpt, build_heads(config, parameters_of(random_heads(config, count)), dtype)


def drafting(gpt, heads, slots=1, **options):
    return drafting_backend(gpt, heads, slots, gpt.config.seq_len, measured=False, **options)


def write(backend, prompt, count, sampling=GREEDY, scheduler=None, **options):
    """The tokens of one request, with what was said of them, and the scheduler."""
    found = []
    scheduler = scheduler or Scheduler(backend)
    request = Request(prompt, count, sampling, on_token=lambda token: bool(found.append(token)), **options)
    scheduler.submit(request)
    scheduler.run()
    return found, scheduler


@pytest.mark.parametrize(("count", "prompt"), [(1, [5]), (2, list(range(7))), (3, list(range(100, 170)))])
def test_greedy_output_is_the_networks(count, prompt):
    """Also beyond the end of the context, which is at 48 tokens."""
    gpt, heads = network(count=count)
    expected, _ = write(TorchBackend(gpt), prompt, 80, slide=True)
    found, scheduler = write(drafting(gpt, heads), prompt, 80, slide=True)
    assert found == expected
    assert scheduler.drafting.drafted > 50
    assert scheduler.drafting.passes < 80


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0.7), Sampling(1.2, top_k=20, top_p=0.9), Sampling(0.5, repetition_penalty=1.3, frequency_penalty=0.4)],
)
def test_sampled_tokens_are_those_of_the_seed(sampling):
    """With penalties, which count what was just drawn, and with likelihoods."""
    gpt, heads = network()
    for seed in range(3):
        options = {"seed": seed, "logprobs": 2}
        expected, _ = write(TorchBackend(gpt, vocab_limit=40), [1, 2, 3], 40, sampling, **options)
        found, scheduler = write(drafting(gpt, heads, vocab_limit=40), [1, 2, 3], 40, sampling, **options)
        assert [token.id for token in found] == [token.id for token in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-9)
        assert scheduler.drafting.drafted > 20


def test_drafts_change_nothing_to_the_last_bit_whoever_comes_and_goes():
    """In float32, requests that are alone and then are not, on slots that others have used; half right drafts."""
    gpt, heads = network(torch.float32)
    draw = random.Random(0)
    requests = [[draw.randrange(300) for _ in range(draw.randint(1, 20))] for _ in range(9)]
    requests[4] = [*requests[3], 7]  # begins as the one before it, and is read from its slot
    outputs = []
    for drafted in (False, True):
        backend = drafting(gpt, heads, slots=3)
        if not drafted:
            backend.drafter, backend.drafts = None, 0
        arrive, found = random.Random(1), []
        scheduler = Scheduler(backend)
        for seed, prompt in enumerate(requests):
            own = []
            found.append(own)
            sampling = Sampling(0.8 if seed % 2 else 0)
            scheduler.submit(
                Request(prompt, 15, sampling, seed, logprobs=0, on_token=lambda t, own=own: bool(own.append(t)))
            )
            for _ in range(arrive.randint(1, 9)):
                scheduler.step()
        scheduler.run()
        outputs.append(found)
        assert bool(scheduler.drafting.drafted) == drafted
    assert outputs[0] == outputs[1]


def test_drafts_are_the_heads_over_the_whole_sequence(monkeypatch):
    """Cached drafting against the heads applied to everything at once: wrong rows would only lower the acceptance."""
    gpt, heads = network(count=3)
    backend, seen = drafting(gpt, heads, slots=2), []
    original = backend.draft

    def spy(slot, tokens, count):
        drafts = original(slot, tokens, count)
        seen.append((list(tokens), drafts))
        return drafts

    monkeypatch.setattr(backend, "draft", spy)
    scheduler = Scheduler(backend)
    begin = list(range(3, 38))
    for prompt, seed in ((begin, 0), ([*begin, 9], 1), ([2, 7, 1], 2), ([*begin[:33], 8], 3)):
        write(backend, prompt, 12, Sampling(1.5), scheduler, seed=seed)
    checked = 0
    with torch.inference_mode():
        for tokens, drafts in seen:
            row, rows = torch.tensor([tokens + drafts]), len(tokens) - 1
            hidden = gpt.hidden(row[:, :rows])
            for depth, (head, draft) in enumerate(zip(heads, drafts, strict=False)):
                embedded = gpt.embed(row[:, depth + 1 : depth + 1 + rows])
                hidden = head(hidden, embedded, gpt.cos[:rows], gpt.sin[:rows])
                assert draft == int(gpt.logits(hidden[0, -1]).argmax())
                checked += 1
    assert checked > 40


def test_a_head_that_is_always_right_saves_half_the_passes(monkeypatch):
    gpt, heads = network(count=1)
    expected, _ = write(TorchBackend(gpt), [1, 2, 3], 41)
    answer = [1, 2, 3, *(token.id for token in expected)]
    backend = drafting(gpt, heads)
    monkeypatch.setattr(backend, "draft", lambda slot, tokens, count: answer[len(tokens) : len(tokens) + count])
    found, scheduler = write(backend, [1, 2, 3], 41)
    assert found == expected
    statistics = scheduler.drafting
    assert (statistics.accepted, statistics.drafted, statistics.passes) == (20, 20, 20)
    assert "2.00 a pass" in str(statistics)
    assert "100%" in str(statistics)


def test_ends_where_plain_decoding_ends():
    gpt, heads = network()
    answer = [token.id for token in write(TorchBackend(gpt), [1, 2, 3], 30)[0]]
    ends = [({"stop_ids": frozenset([answer[7]])}, answer.index(answer[7]))]
    for options, length in [*ends, *(({}, count) for count in (1, 2, 3))]:
        count = 30 if options else length
        found, _ = write(drafting(gpt, heads), [1, 2, 3], count, **options)
        assert [token.id for token in found] == answer[:length]
    room = SMALL.seq_len - 3 + 1  # the last token need not fit
    for backend in (TorchBackend(gpt), drafting(gpt, heads)):
        assert len(write(backend, [1, 2, 3], 1000)[0]) == room


def test_a_request_whose_drafts_do_not_pay_goes_on_without(monkeypatch):
    """After the trial; the next request has one of its own."""
    gpt, heads = network(count=1)
    backend = drafting(gpt, heads)
    backend.draft_cost = 1.5
    monkeypatch.setattr(backend, "draft", lambda slot, tokens, count: [299][:count])
    scheduler = Scheduler(backend)
    for turn in (1, 2):
        write(backend, [1, 2, 3], 40, scheduler=scheduler)
        assert scheduler.drafting.passes == turn * scheduling.TRIAL
    backend.draft_cost = 0.0
    write(backend, [1, 2, 3], 40, scheduler=scheduler)
    assert scheduler.drafting.passes > 3 * scheduling.TRIAL


def test_nothing_is_drafted_where_it_cannot_pay(monkeypatch):
    gpt, heads = network(torch.float32, count=2)
    assert relative_cost(drafting(gpt, heads)) > 0.5
    short = inference_copy(random_gpt(dataclasses.replace(SMALL, seq_len=2)))
    assert relative_cost(TorchBackend(short, drafter=Drafter(short, heads, 1, 2))) == 0
    for cost, drafts in ((2.9, 2), (3.0, 0)):
        monkeypatch.setattr(speculative, "relative_cost", lambda backend, cost=cost: cost)
        backend = drafting_backend(gpt, heads, 1, SMALL.seq_len)
        assert (backend.drafts, backend.drafter is None) == (drafts, drafts == 0)


@pytest.fixture
def run(tmp_path):
    config = dataclasses.replace(SMALL, dim=128, seq_len=64, weight_block=128)
    folder = write_run(tmp_path / "run", random_gpt(config), objectives=parameters_of(random_heads(config, 1)))
    Byte().build().save(folder / "tokenizer.json")
    return folder


def test_command(run, tmp_path, capsys):
    """`generate --speculate on`, of a run and of a file with its heads: the same text as without, up to rounding."""
    path = tmp_path / "model.gguf"
    export_gguf(load_run(run), path, "f32", own=True)
    texts = []
    for source in (run, path):
        options = [str(source), "--prompt", "abc", "--max-tokens", "30", "--temperature", "0"]
        assert generate.main([*options, "--speculate", "off"]) == 0
        alone = capsys.readouterr()
        assert "passes of the trunk" not in alone.err
        assert generate.main([*options, "--speculate", "on"]) == 0
        output = capsys.readouterr()
        assert "passes of the trunk" in output.err
        assert len(output.out) > 10
        assert output.out[:8] == alone.out[:8]  # float32 may round two ways later on
        texts.append(output.out)
    assert texts[0] == texts[1]
    without = write_run(tmp_path / "without", random_gpt())
    Byte().build().save(without / "tokenizer.json")
    for options, message in (
        ([str(without)], r"trained without \+mtp=on"),
        ([str(run), "--backend", "llama.cpp"], "--speculate on needs the torch backend"),
    ):
        with pytest.raises(UserError, match=message):
            generate.main([*options, "--speculate", "on"])


def test_heads_that_cannot_draft(tmp_path):
    """They are left out, or refused where drafts were asked for."""
    mtp = MultiTokenPrediction(SMALL, kind="parallel", tokens=2)
    folder = write_run(tmp_path / "run", random_gpt(), objectives=parameters_of(mtp))
    Byte().build().save(folder / "tokenizer.json")
    assert load_model(folder, Settings("torch", slots=1)).backend.drafts == 0
    with pytest.raises(UserError, match="not sequential"):
        load_model(folder, Settings("torch", slots=1, speculate="on"))
