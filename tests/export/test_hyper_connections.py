"""The `.mhc` sidecar against its byte table, and residual streams in our own GGUF files."""

from __future__ import annotations

import contextlib
import dataclasses
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.checkpoint import load_run
from nanochat.errors import UserError
from nanochat.export import cli
from nanochat.export.hyper_connections import Record, read_mhc, records_of, write_mhc
from nanochat.export.read_back import import_export, network, read_export
from nanochat.export.verify import verify
from nanochat.inference.engine import inference_copy
from nanochat.model import GPT
from nanochat.model.hyper_connections import HyperConnection
from tests.export.conftest import BASE
from tests.export.test_read_back import TOKENS, export, with_gpt
from tests.inference.helpers import write_run


def streams_gpt(streams, maps="static", **changes):
    gpt = GPT(dataclasses.replace(BASE, streams=streams, stream_maps=maps, zero_init=False, **changes), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if "hyper" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return gpt


def by_the_table(gpt, version):
    """The bytes, written from the format's table alone."""
    modules = [m for m in gpt.modules() if isinstance(m, HyperConnection)]
    n = modules[0].streams
    data = b"\x21\x43\x48\x6d" + struct.pack("<III", version, len(modules), n)
    for module in modules:
        res, pre, post = (p.tolist() for p in (module.res, module.pre, module.post))
        if n == 2:
            difference = np.float32(res[0]) - np.float32(res[1])
            data += struct.pack("<f2f2f2f2f", difference, *pre, 0, 0, *post, 0, 0)
        else:
            data += struct.pack("<24f4f4f4f4f", *res, *pre, 0, 0, 0, 0, *post, 0, 0, 0, 0)
    return data


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("streams", [2, 4])
def test_our_bytes_are_the_tables(streams, version, tmp_path):
    gpt, path = streams_gpt(streams), tmp_path / "model.mhc"
    size = write_mhc(path, records_of(gpt), streams, version)
    assert path.read_bytes() == by_the_table(gpt, version)
    assert size == 16 + 2 * BASE.n_layers * {2: 36, 4: 160}[streams]
    path.write_bytes(by_the_table(gpt, version))
    found, records = read_mhc(path)
    assert found == streams
    for record, expected in zip(records, records_of(gpt), strict=True):
        assert all(np.array_equal(getattr(record, f), getattr(expected, f)) for f in ("res", "pre", "post"))


@pytest.mark.parametrize("streams", [2, 4])
def test_the_file_describes_the_maps(streams, tmp_path):
    """sigmoid, 2 sigmoid and the permutations, from the file alone, are what the network multiplies by."""
    gpt, path = streams_gpt(streams), tmp_path / "model.mhc"
    write_mhc(path, records_of(gpt), streams)
    _, records = read_mhc(path)
    modules = [m for m in gpt.modules() if isinstance(m, HyperConnection)]
    for module, record in zip(modules, records, strict=True):
        pre, post, res = (m.detach().numpy() for m in module.maps(torch.zeros(streams, 1, 1, 256)))
        np.testing.assert_allclose(1 / (1 + np.exp(-record.pre)), pre, atol=1e-6)
        np.testing.assert_allclose(2 / (1 + np.exp(-record.post)), post, atol=1e-6)
        if streams == 2:
            alpha = 1 / (1 + np.exp(-record.res[0]))
            np.testing.assert_allclose([[alpha, 1 - alpha], [1 - alpha, alpha]], res, atol=1e-6)
        else:
            assert res[0, 0] == pytest.approx((np.exp(record.res) / np.exp(record.res).sum())[:6].sum(), abs=1e-6)


def test_bias_and_logits_add_up(tmp_path):
    path = tmp_path / "x.mhc"
    path.write_bytes(struct.pack("<4I9f", 0x6D484321, 1, 1, 2, 5.0, 1, 2, 0.5, 0.25, 3, 4, -1, -2))
    _, [record] = read_mhc(path)
    assert record.res.tolist() == [5.0]
    assert record.pre.tolist() == [1.5, 2.25]
    assert record.post.tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too short"),
        (struct.pack("<4I", 0x46554747, 2, 0, 2), "not a .mhc file"),
        (struct.pack("<4I", 0x6D484321, 3, 0, 2), "version 3"),
        (struct.pack("<4I", 0x6D484321, 2, 0, 3), "3 streams"),
        (struct.pack("<4I", 0x6D484321, 2, 2**32 - 1, 4), "4294967295 records"),
        (struct.pack("<4I9f", 0x6D484321, 2, 1, 4, *[0.0] * 9), "1 records of 160 bytes, and has 36"),
        (struct.pack("<4I9f", 0x6D484321, 2, 1, 2, *[float("nan")] * 9), "not finite"),
        (struct.pack("<4I9f", 0x6D484321, 2, 1, 2, *[0.0] * 9) + b"x", "has 37 bytes"),
    ],
)
def test_damaged_files(data, message, tmp_path):
    path = tmp_path / "x.mhc"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_mhc(path)


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_flipped_bytes(tmp_path, data):
    path = tmp_path / "x.mhc"
    content = bytearray(struct.pack("<4I18f", 0x6D484321, 2, 2, 2, *range(18)))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), 20, 3]))])
    with contextlib.suppress(UserError):
        streams, records = read_mhc(path)
        assert all(record.pre.shape == (streams,) for record in records)


def test_what_the_sidecar_cannot_hold(tmp_path):
    with pytest.raises(UserError, match=r"mhc\.streams=1"):
        records_of(GPT(BASE, seed=0))
    with pytest.raises(UserError, match=r"mhc\.maps=dynamic"):
        records_of(streams_gpt(2, "dynamic"))
    with pytest.raises(UserError, match="not finite"):
        write_mhc(tmp_path / "x", [Record(np.array([np.inf]), np.zeros(2), np.zeros(2))], 2)
    with pytest.raises(UserError, match="sizes"):
        write_mhc(tmp_path / "x", [Record(np.zeros(24), np.zeros(2), np.zeros(2))], 2)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
@pytest.mark.parametrize(("streams", "maps"), [(2, "static"), (4, "static"), (4, "dynamic")])
def test_residual_streams_in_our_own_gguf(streams, maps, runs, tmp_path):
    gpt = streams_gpt(streams, maps)
    run = with_gpt(runs("qwen3"), gpt)
    path = export(run, tmp_path / "file.gguf", "own-tq2_0")
    exported = read_export(path)
    assert exported.config == gpt.config
    ours = inference_copy(gpt)(TOKENS)
    assert torch.equal(inference_copy(network(exported))(TOKENS), ours)
    again = load_run(import_export(path, tmp_path / "again"))
    assert torch.equal(inference_copy(again.gpt)(TOKENS), ours)
    assert verify(path, run, length=64).passed


def test_export_writes_the_sidecar(runs, tmp_path, capsys, monkeypatch):
    gpt = streams_gpt(2)
    folder = write_run(tmp_path / "run", gpt)
    (folder / "tokenizer.json").write_bytes((runs("qwen3").folder / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match=r"mhc\.streams=2.*--to nanochat"):
        cli.export_main([str(folder)])
    assert cli.export_main([str(folder), "--to", "nanochat"]) == 0
    assert "runs in nanochat only" in capsys.readouterr().out
    assert (folder / "nanochat-tq2_0.mhc").read_bytes() == by_the_table(gpt, 2)
