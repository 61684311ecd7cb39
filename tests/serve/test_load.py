"""The benches of serving, in their short forms."""

from __future__ import annotations

import json

import pytest

from nanochat.bench import load, serve
from nanochat.bench.load import Outcome, main
from nanochat.bench.serve import percentile


def test_load_with_faults(run, capsys):
    """Seconds of what `nanochat bench load` does for ten minutes: known answers beside broken clients."""
    code = main([str(run), "--seconds", "6", "--clients", "4", "--backend", "torch", "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["right"] > 0, figures
    assert (figures["wrong"], figures["lost"]) == (0, 0), figures
    assert sum(figures["faults"].values()) > 3, figures
    assert figures["memory_growth"] < 1.5, figures
    assert figures["latency_by_rate_ms"] == pytest.approx(4000 / figures["answers_per_second"])
    assert code == (0 if figures["passed"] else 1)  # of the latency a busy machine says nothing


def test_load_notices_a_wrong_answer_a_lost_one_and_growth(monkeypatch):
    found = Outcome(memory=[(float(i), 100 << 20) for i in range(30)])
    assert not found.grew
    found.memory += [(float(30 + i), 140 << 20) for i in range(10)]
    assert found.grew
    assert found.growth == pytest.approx(1.4)

    async def once(text, found):
        async def answer(place, prompt):
            if text is None:
                raise ConnectionError("the stream ended early.")
            return text

        monkeypatch.setattr(load, "answer", answer)
        await load.honest(load.Place("", 0, 0), {(1,): "right"}, load.random.Random(0), found)

    for text, counts in (("right", (1, 0, 0)), ("other", (1, 1, 0)), (None, (1, 1, 1))):
        load.asyncio.run(once(text, found))
        assert (found.right, len(found.wrong), len(found.lost)) == counts


def test_bench_serve(run, capsys):
    options = ["--backends", "torch", "--clients", "1,3", "--requests", "1", "--prompt", "8", "--tokens", "8", "--json"]
    assert serve.main([str(run), *options]) == 0
    figures = json.loads(capsys.readouterr().out)[f"{run}, torch"]
    assert figures["alone"] > 0
    rows = {name: row for name, row in figures.items() if name != "alone"}
    assert list(rows) == ["closed, 1 clients", "closed, 3 clients", "open, 50% of the rate"]
    for name, requests in (("closed, 1 clients", 1), ("closed, 3 clients", 3), ("open, 50% of the rate", 8)):
        row = rows[name]
        assert (row["requests"], row["failed"]) == (requests, 0)
        assert 0 < row["first_p50"] <= row["first_p95"] <= row["whole_p95"]
        assert row["tokens_per_second"] > 0
    assert [percentile(range(100), share) for share in (0.5, 0.95, 1.0)] == [50, 95, 99]
