"""Corpora: which files, in which order, and what becomes of those that are no text."""

import gzip
import json
import os
import random
from pathlib import Path

import pytest
import zstandard

from nanochat.data import DataModule, sources
from nanochat.data.sources import Corpus, Document, Skipped, jsonl
from nanochat.data.sources import text as text_source
from nanochat.data.sources.jsonl import JsonLines
from nanochat.data.sources.stdlib import StandardLibrary
from nanochat.data.sources.text import TextFiles
from nanochat.data.tokenizer import Byte
from nanochat.errors import ConfigError, UserError
from nanochat.files import anchored


def names(corpus: Corpus, skipped: Skipped | None = None) -> list[str]:
    return [document.name for document in corpus.documents(skipped)]


def test_standard_library_is_source_without_tests():
    files = StandardLibrary().files()
    names = [file.name for file in files]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names)
    for name in names:
        assert not {"test", "tests", "idle_test", "site-packages", "__pycache__"} & set(Path(name).parts)
    assert sum(file.size for file in files) > 5e6


def test_folders_globs_and_files_in_a_fixed_order(tmp_path):
    for name in ("b/2.txt", "b/1.txt", "a/3.md", ".git/x.txt", "b/.hidden.txt", "node_modules/y.txt", "b/[x].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    assert names(TextFiles([tmp_path])) == ["a/3.md", "b/1.txt", "b/2.txt", "b/[x].txt"]
    assert names(TextFiles([tmp_path], extensions=["md"])) == ["a/3.md"]
    assert names(TextFiles([tmp_path / "**" / "*.md"])) == ["a/3.md"]
    assert names(TextFiles([tmp_path / "b" / "[12].txt"])) == ["1.txt", "2.txt"]
    # a file that is named is taken whatever its extension; brackets in a name that exists are no glob
    assert names(TextFiles([tmp_path / "a" / "3.md"], extensions=[".txt"])) == ["3.md"]
    assert names(TextFiles([tmp_path / "b" / "[x].txt"])) == ["[x].txt"]
    # paths that overlap give a file once
    assert names(TextFiles([tmp_path / "b" / "2.txt", tmp_path / "b"])) == ["2.txt", "1.txt", "[x].txt"]


@pytest.mark.parametrize("path", ["a/1.txt", "a", "a/*.txt", "./*/1.txt", "**/*.txt", "a/../a/[1].txt", "a/[x].txt"])
def test_documents_have_the_same_names_wherever_their_path_begins(path, tmp_path, monkeypatch):
    """Their split depends on the name."""
    for folder in ("in [1]/a", "in [1]/b"):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("1.txt", "[x].txt"):
            (tmp_path / folder / name).write_text(f"{folder} {name}")
    monkeypatch.chdir(tmp_path / "in [1]")
    relative, absolute = TextFiles([path]), TextFiles([anchored(path)])
    found = list(relative.documents())
    assert found
    monkeypatch.chdir(tmp_path)
    assert list(absolute.documents()) == found


def test_paths_at_home_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "1.txt").write_text("text")
    assert anchored("~/*.txt") == "~/*.txt"
    assert names(TextFiles([anchored("~/*.txt")])) == ["1.txt"]
    assert anchored("/a/b.txt") == "/a/b.txt"


@pytest.mark.parametrize("path", ["missing.txt", "no-*.txt", "~nobody-of-that-name/x"])
def test_a_path_without_files_is_named(tmp_path, path):
    with pytest.raises(UserError, match=r"data\.val_paths=.*(does not exist|matches no file)"):
        TextFiles([path if path.startswith("~") else tmp_path / path], "data.val_paths").files()


def test_what_is_no_text_is_skipped_and_named(tmp_path, monkeypatch):
    (tmp_path / "good.txt").write_text("täxt\r\n", newline="")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfwith a mark\n")
    (tmp_path / "latin.txt").write_bytes("täxt".encode("latin-1"))
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    (tmp_path / "cut.txt").write_bytes("ü".encode()[:1])
    (tmp_path / "long.txt").write_text("x" * 100)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    os.mkfifo(tmp_path / "pipe.txt")  # reading it would never end
    (tmp_path / "locked").mkdir()
    (tmp_path / "unreadable.txt").write_text("a")
    (tmp_path / os.fsdecode(b"\xff.txt")).write_bytes(b"\xff")
    scandir, real_open = os.scandir, open

    def locked(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    def unreadable(path, *args, **kwargs):
        if Path(path).name == "unreadable.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "scandir", locked)
    monkeypatch.setattr("builtins.open", unreadable)
    skipped = Skipped()
    documents = list(TextFiles([tmp_path], max_file_bytes=50).documents(skipped))
    assert {d.name: d.text for d in documents} == {"good.txt": "täxt\r\n", "bom.txt": "with a mark\n"}
    reasons = {
        "latin.txt": "not UTF-8",
        "binary.txt": "binary",
        "cut.txt": "not UTF-8",
        "long.txt": "more than 50 bytes",
        "gone.txt": "No such file or directory",
        "loop.txt": "Too many levels of symbolic links",
        "pipe.txt": "not a regular file",
        "locked": "Permission denied",
        "unreadable.txt": "Permission denied",
        "\\udcff.txt": "not UTF-8",
    }
    assert skipped.named == reasons
    assert skipped.count == len(reasons)
    str(skipped).encode()


def test_a_long_file_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(text_source, "PART_BYTES", 50)
    text = "".join(f"línea {i} 🙂\n" for i in range(40)) + "x" * 170 + "\nend"
    (tmp_path / "long.txt").write_text(text)
    documents = list(TextFiles([tmp_path]).documents())
    assert "".join(d.text for d in documents) == text
    assert len(documents) > 5
    assert documents[0].name == "long.txt#0"
    assert all(d.text.endswith("\n") for d in documents[:5])


def test_a_long_file_that_turns_bad_keeps_its_good_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(text_source, "PART_BYTES", 50)
    (tmp_path / "long.txt").write_bytes(b"good line\n" * 12 + b"\xff")
    skipped = Skipped()
    documents = list(TextFiles([tmp_path]).documents(skipped))
    assert "".join(d.text for d in documents) == "good line\n" * 10
    assert skipped.named == {"long.txt from part 2": "not UTF-8"}


RECORDS = [{"text": "one"}, {"text": "zwei\nlines"}, {"other": 1}, {"text": ""}, {"text": 3}, [1], {"text": "\ud800"}]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_json_lines(tmp_path, ending):
    data = "\n".join(map(json.dumps, RECORDS)).encode() + b'\n\n{"text": "\xff"}\n{"text": "last"}\n{"te'
    pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.ZstdCompressor().compress}[ending]
    (tmp_path / f"a.{ending}").write_bytes(pack(data))
    skipped = Skipped()
    documents = list(JsonLines([tmp_path]).documents(skipped))
    assert [(d.name.split(":")[1], d.text) for d in documents] == [("1", "one"), ("2", "zwei\nlines"), ("10", "last")]
    assert [name.split(":")[1] for name in skipped.named] == ["3", "5", "6", "7", "9", "11"]
    assert names(JsonLines([tmp_path], text_key="other")) == []


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_damaged_compression_is_skipped_from_there(tmp_path, ending):
    generator = random.Random(0)
    lines = b"".join(json.dumps({"text": f"record {i} {generator.random()}"}).encode() + b"\n" for i in range(20000))
    pack = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}[ending]
    packed = bytearray(pack(lines))
    packed[len(packed) // 2 :] = b"\xff" * len(packed[len(packed) // 2 :])
    (tmp_path / f"a.jsonl.{ending}").write_bytes(packed)
    (tmp_path / f"b.jsonl.{ending}").write_bytes(b"this was never compressed")
    (tmp_path / "c.jsonl").write_text('{"text": "fine"}')
    skipped = Skipped()
    found = names(JsonLines([tmp_path]), skipped)
    assert found[-1] == "c.jsonl:1"
    assert 1000 < len(found) < 20000
    assert any(name.startswith("b.jsonl") for name in skipped.named)


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_cut_and_joined_compressed_files(tmp_path, ending):
    pack = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}[ending]
    frames = [pack(f'{{"text": "record {i}"}}\n'.encode()) for i in range(3)]
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(b"".join(frames))
    assert len(names(JsonLines([path]))) == 3
    for cut in range(1, len(frames[2])):
        path.write_bytes(b"".join(frames)[:-cut])
        skipped = Skipped()
        assert len(names(JsonLines([path]), skipped)) >= 2
        assert skipped.count == 1


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "LINE_BYTES", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + "x" * 2000)
    skipped = Skipped()
    assert names(JsonLines([tmp_path]), skipped) == ["a.jsonl:1"]
    assert skipped.named == {"a.jsonl:2": "a line of more than 1000 bytes"}


def test_fingerprints_follow_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    corpus = TextFiles([tmp_path])
    first = corpus.fingerprint()
    assert corpus.fingerprint() == first
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    second = corpus.fingerprint()
    (tmp_path / "b.txt").write_text("two")
    third = corpus.fingerprint()
    assert first != second != third
    lines = [JsonLines([tmp_path], text_key=key).fingerprint() for key in ("text", "content")]
    assert third != lines[0] != lines[1]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt.gz", gzip.compress("täxt\n".encode())),
        ("a.txt.zst", zstandard.ZstdCompressor().compress("täxt\n".encode())),
        ("a.txt", "täxt\n".encode("utf-16")),
        ("a.txt", b"\xfe\xff" + "täxt\n".encode("utf-16-be")),
        ("a.txt", "täxt\n".encode("utf-32")),
    ],
    # gzip writes the time: made from the bytes, the names would differ between the two workers
    ids=["gzip", "zstd", "utf-16", "utf-16-be", "utf-32"],
)
def test_compressed_and_marked_text(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    for extensions in (None, [".txt"]):
        assert list(TextFiles([tmp_path], extensions=extensions).documents()) == [Document(name, "täxt\n")]
    assert list(TextFiles([tmp_path], extensions=[".md"]).documents()) == []


def test_what_a_text_folder_cannot_read_is_said(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1\x15\0\x15PAR1")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"x" * 10000)[:-20])
    (tmp_path / "c.txt.gz").write_bytes(b"never compressed")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfea\0\0\xd8")  # half a surrogate pair
    (tmp_path / "e.txt").write_bytes(b"")
    (tmp_path / "f.tar.gz").write_bytes(gzip.compress(b"\0" * 100))
    skipped = Skipped()
    assert list(TextFiles([tmp_path]).documents(skipped)) == []
    assert skipped.named.pop("a.parquet").endswith("use data=jsonl")
    assert "ended" in skipped.named.pop("b.txt.gz")
    assert "gzip" in skipped.named.pop("c.txt.gz")
    assert skipped.named == {"d.txt": "not UTF-16", "f.tar.gz": "binary"}
    assert (skipped.count, skipped.empty) == (5, 1)


def test_fingerprints_of_earlier_versions_still_find_their_shards(tmp_path):
    """They are a part of the cache's key: another word here would prepare every corpus anew."""
    for name, reader in (("text", "Corpus"), ("code", "Corpus"), ("jsonl", "JsonLines")):
        found = sources.build(name, [str(tmp_path)], "data.paths", {}).fingerprint()
        expected = {"kind": name, "reader": reader, "files": []}
        assert found == expected | ({"text_key": "text"} if name == "jsonl" else {})
    assert StandardLibrary().fingerprint()["reader"] == "Corpus"


class Countdown:
    """A corpus that is no part of nanochat."""

    kind = "countdown"

    def __init__(self, start: int = 3) -> None:
        self.start = start

    def documents(self, skipped=None):
        return (Document(str(i), f"{i} bottles\n" * 20) for i in range(self.start, 0, -1))

    def fingerprint(self):
        return {"start": self.start}


def test_a_class_of_ones_own_is_a_corpus(tmp_path):
    name = f"{__name__}.Countdown"
    corpus = sources.build(name, [], "data.paths", {"start": 5, "extensions": None})
    assert [d.name for d in corpus.documents()] == ["5", "4", "3", "2", "1"]
    assert not sources.reads_paths(name)
    with pytest.raises(ConfigError, match=r"data\.strat is not an option of data\.corpus=.*did you mean 'start'"):
        sources.build(name, [], "data.paths", {"strat": 5})
    data = DataModule(corpus=name, options={"start": 60}, tokenizer=Byte(), seq_len=16, cache_dir=str(tmp_path))
    data.prepare_data()
    data.setup()
    assert "countdown" in data.folder
    assert data.header["corpus"] == "countdown"
    splits = data.header["splits"]
    assert splits["train"]["documents"] + splits["val"]["documents"] >= 60


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("stdlb", "did you mean 'stdlib'"),
        ("no.such.Corpus", "there is no package 'no'"),
        ("pathlib.Paht", "did you mean 'Path'"),
        ("pathlib.Path", "is not a corpus"),
        ("json.dumps", "is not a corpus"),
    ],
)
def test_names_that_are_not_a_corpus(name, said):
    with pytest.raises(ConfigError, match=said):
        DataModule(corpus=name)
