"""Damaged files end in one clear error: never a crash, a hang, or a huge allocation."""

from __future__ import annotations

import contextlib
import resource
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nanochat.errors import UserError
from nanochat.export.gguf import export_gguf
from nanochat.export.gguf_reader import GGUFFile
from nanochat.export.huggingface import export_huggingface
from nanochat.export.read_back import network, read_export
from nanochat.model import GPTConfig

SLOW = settings(max_examples=150, deadline=2000, suppress_health_check=list(HealthCheck))
TINY = GPTConfig(vocab_size=512, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=32, seq_len=16)


@pytest.fixture(scope="module")
def small_run(runs):
    return runs("fuzz", TINY, steps=0)


@pytest.fixture(scope="module")
def original(small_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "model.gguf"
    export_gguf(small_run, path, "q4_0")
    return path.read_bytes()


@pytest.fixture(autouse=True)
def little_memory():
    """Whatever a file claims, reading it must not need more than 2 GB beyond what is in use."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def read(path, data):
    path.write_bytes(data)
    with contextlib.suppress(UserError):
        network(read_export(path))


@SLOW
@given(data=st.data())
def test_flipped_bytes(original, tmp_path, data):
    content = bytearray(original)
    with GGUFFile(_write(tmp_path, original)) as file:
        header = min(tensor.offset for tensor in file.tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        # mostly in the header, where it matters
        last = header - 1 if data.draw(st.booleans()) else len(content) - 1
        content[data.draw(st.integers(0, last))] ^= data.draw(st.integers(1, 255))
    read(tmp_path / "x.gguf", bytes(content))


@SLOW
@given(st.integers(0, 100_000))
def test_truncation_is_always_seen(original, tmp_path, keep):
    path = _write(tmp_path, original[: min(keep, len(original) - 33)])
    with pytest.raises(UserError):
        GGUFFile(path)


@SLOW
@given(st.binary(max_size=200), st.sampled_from([b"", b"GGUF", b"GGUF\x03\0\0\0"]))
@example(struct.pack("<QQ", 2**63, 0), b"GGUF\x03\0\0\0")
@example(struct.pack("<QQ", 0, 2**63), b"GGUF\x03\0\0\0")
@example(struct.pack("<QQQ", 0, 1, 2**62), b"GGUF\x03\0\0\0")
@example(struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 4, 2**61), b"GGUF\x03\0\0\0")
@example(struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 8, 2**61), b"GGUF\x03\0\0\0")
@example(struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 9, 2**61), b"GGUF\x03\0\0\0")
@example(struct.pack("<QQQ1sIQQIQ", 1, 0, 1, b"t", 2, 2**40, 2**40, 0, 0), b"GGUF\x03\0\0\0")
@example(struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 4, 0, 2**63), b"GGUF\x03\0\0\0")
@example(struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 0, 0, 0), b"GGUF\x03\0\0\0")
@example(struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 4, 99, 0), b"GGUF\x03\0\0\0")
@example(struct.pack("<QQQ1sI", 1, 0, 1, b"t", 2**31), b"GGUF\x03\0\0\0")
def test_invented_headers(tmp_path, body, start):
    path = _write(tmp_path, start + body)
    try:
        with GGUFFile(path) as file:
            assert not file.tensors or all(tensor.size <= len(body) for tensor in file.tensors.values())
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("key", "value"),
    [("seq_len", 2**40), ("dim", 2**30), ("n_layers", 2**31), ("vocab_size", 2**33), ("n_heads", 1), ("rope_base", "x"),
     ("dim", -1), ("ffn_dim", 2**40), ("unknown", 1)],
)  # fmt: skip
def test_a_configuration_that_lies(small_run, tmp_path, key, value, monkeypatch):
    import json

    from nanochat.export import gguf as export

    real = json.dumps
    monkeypatch.setattr(export.json, "dumps", lambda values: real({**values, key: value}))
    path = tmp_path / "model.gguf"
    export_gguf(small_run, path, "q4_0")
    with pytest.raises(UserError):
        network(read_export(path))


def test_overlapping_and_repeated_tensors(tmp_path):
    def tensor(name: bytes, offset: int) -> bytes:
        return struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 16, 0, offset)

    def file(*tensors: bytes) -> bytes:
        head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0) + b"".join(tensors)
        return head + bytes(-len(head) % 32) + bytes(256)

    with GGUFFile(_write(tmp_path, file(tensor(b"a", 0), tensor(b"b", 64)))) as whole:
        assert np.array_equal(whole.array("b"), np.zeros(16))
        with pytest.raises(UserError, match="no tensor 'c'"):
            whole.array("c")
    for tensors, message in (
        ((tensor(b"a", 0), tensor(b"b", 32)), "overlaps"),
        ((tensor(b"a", 0), tensor(b"a", 64)), "twice"),
        ((tensor(b"a", 8),), "aligned"),
        ((tensor(b"a", 256),), "ends inside tensor"),
    ):
        with pytest.raises(UserError, match=message):
            GGUFFile(_write(tmp_path, file(*tensors)))


@SLOW
@given(data=st.data())
def test_flipped_bytes_of_a_safetensors_folder(small_run, tmp_path, data):
    folder = tmp_path / "hf"
    if not folder.exists():
        export_huggingface(small_run, folder)
        for file in folder.iterdir():
            file.with_suffix(file.suffix + ".orig").write_bytes(file.read_bytes())
    name = data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    content = bytearray((folder / f"{name}.orig").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        last = min(len(content), 3000) if data.draw(st.booleans()) else len(content)
        content[data.draw(st.integers(0, last - 1))] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    with contextlib.suppress(UserError):
        network(read_export(folder))
    (folder / name).write_bytes((folder / f"{name}.orig").read_bytes())


def _write(folder, data):
    path = folder / "x.gguf"
    path.write_bytes(data)
    return path
