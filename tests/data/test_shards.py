"""Shards that were cut, changed or are something else are refused with a sentence."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data.prepare import prepare
from nanochat.data.shards import FORMAT, HEADER, open_shards, write_header
from nanochat.data.sources.text import TextFiles
from nanochat.data.tokenizer import BPE, Byte
from nanochat.errors import UserError

from .conftest import make_text


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    (root / "text.txt").write_text(make_text(0, 300))
    return prepare(TextFiles([root / "text.txt"]), BPE(300), root / "cache").folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def test_a_copy_opens(folder, whole):
    copy, original = open_shards(folder), open_shards(whole)
    assert copy.identity == original.identity
    assert (copy.train.tokens == original.train.tokens).all()
    assert copy.tokenizer.hash == original.tokenizer.hash
    assert not copy.train.tokens.flags.writeable


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "train.documents.bin", "val.documents.bin"])
@pytest.mark.parametrize("change", [-1, 1, -2, 8, None])
def test_files_of_another_size(folder, name, change):
    data = (folder / name).read_bytes()
    if change is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(
        UserError, match=rf"{name.replace('.', '[.]')} (has \d+ bytes|cannot be read).*delete the folder"
    ):
        open_shards(folder)


def test_document_starts_outside_of_the_tokens(folder):
    starts = np.fromfile(folder / "train.documents.bin", "<i8")
    for wrong in (1 << 62, -1):
        starts[-1] = wrong
        starts.tofile(folder / "train.documents.bin")
        with pytest.raises(UserError, match="outside of the tokens"):
            open_shards(folder)


@given(position=st.integers(0, 100_000), value=st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_a_changed_byte_of_the_header(whole, tmp_path_factory, position, value):
    data = bytearray((whole / HEADER).read_bytes())
    data[position % len(data)] ^= value
    expected = json.loads((whole / HEADER).read_bytes())
    copy = tmp_path_factory.mktemp("flip")
    for file in whole.iterdir():
        (copy / file.name).symlink_to(file)
    (copy / HEADER).unlink()
    (copy / HEADER).write_bytes(data)
    try:
        header = open_shards(copy).header
    except UserError:
        return
    # the only change that may pass is one that JSON does not see
    expected.pop("checksum")
    assert header == expected


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"format": 1}', b"[" * 100_000, b'{"format": "1"}', b"1e999999"],
)
def test_headers_that_are_none(folder, content):
    (folder / HEADER).write_bytes(content)
    with pytest.raises(UserError, match="cannot be used"):
        open_shards(folder)


def test_a_huge_header_is_not_read(folder):
    with open(folder / HEADER, "wb") as file:
        file.truncate(1 << 40)  # a sparse file
    with pytest.raises(UserError, match="too large"):
        open_shards(folder)


def header_with(folder, **changes):
    header = json.loads((folder / HEADER).read_bytes())
    header.pop("checksum")
    write_header(folder, {**header, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": FORMAT + 1}, "its format is 2, this version reads 1"),
        ({"dtype": "O"}, "says it wrongly"),
        ({"dtype": ["<u2"]}, "says it wrongly"),
        ({"splits": {}}, "lacks"),
        ({"splits": {"train": {"tokens": 1 << 70, "documents": 1, "bytes": 1, "sha256": ""}}}, "train.bin has"),
        ({"splits": {"train": {"tokens": -1, "documents": 1, "bytes": 1, "sha256": ""}}}, "a count"),
        ({"splits": {"train": {"tokens": True, "documents": 1, "bytes": 1, "sha256": ""}}}, "a count"),
        ({"splits": {"train": {"tokens": 1, "documents": 1, "bytes": 1, "sha256": 3}}}, "a hash"),
        ({"tokenizer": {"hash": 3}}, "wrong"),
        ({"tokenizer": None}, "wrong"),
        ({"compression": []}, "wrong"),
    ],
)
def test_headers_that_agree_with_their_checksum_and_are_wrong(folder, changes, message):
    header_with(folder, **changes)
    with pytest.raises(UserError, match=message):
        open_shards(folder)


def test_another_tokenizer(folder):
    Byte().build().save(folder / "tokenizer.json")
    with pytest.raises(UserError, match="another tokenizer"):
        _ = open_shards(folder).tokenizer


def test_empty_splits_open(folder):
    empty = {"tokens": 0, "documents": 0, "bytes": 0, "sha256": ""}
    for split in ("train", "val"):
        (folder / f"{split}.bin").write_bytes(b"")
        (folder / f"{split}.documents.bin").write_bytes(b"")
    header_with(folder, splits={"train": empty, "val": empty})
    assert len(open_shards(folder).train.tokens) == 0
