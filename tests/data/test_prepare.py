"""Preparing: splits that share nothing, shards that say what the text says, a cache that is whole or absent."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nanochat.data import prepare as module
from nanochat.data.prepare import DROPPED, TRAIN, VAL, prepare, scan, split_documents, split_of
from nanochat.data.shards import open_shards
from nanochat.data.sources.base import Document
from nanochat.data.sources.text import TextFiles
from nanochat.data.tokenizer import BPE, Byte
from nanochat.errors import UserError


def documents_of(shards, split: str) -> list[str]:
    """The texts of a split, read back from its files."""
    part = getattr(shards, split)
    ends = [*part.starts[1:], len(part.tokens)]
    assert (part.tokens[part.starts] == shards.tokenizer.eot_id).all()
    assert (np.asarray(part.tokens) == shards.tokenizer.eot_id).sum() == len(part.starts)
    return [
        shards.tokenizer.decode(part.tokens[start + 1 : end].tolist())
        for start, end in zip(part.starts, ends, strict=True)
    ]


@pytest.mark.parametrize("spec", [BPE(300), Byte()], ids=["bpe", "byte"])
def test_shards_hold_the_text(corpus_dir, cache, spec):
    corpus = TextFiles([corpus_dir])
    shards = prepare(corpus, spec, cache)
    expected = {"train": [], "val": []}
    for document in corpus.documents():
        held_out = int(hashlib.sha256(document.name.encode()).hexdigest(), 16) % 20 == 0
        expected["val" if held_out else "train"].append(document.text)
    assert len(expected["val"]) > 1
    for split, texts in expected.items():
        assert documents_of(shards, split) == texts
        said = shards.header["splits"][split]
        assert said["bytes"] == sum(len(text.encode()) for text in texts)
        assert said["documents"] == len(texts)
        whole = [[shards.tokenizer.eot_id, *shards.tokenizer.encode(text)] for text in texts]
        assert getattr(shards, split).tokens.tolist() == [i for ids in whole for i in ids]
        table = shards.tokenizer.token_bytes()
        assert table[np.asarray(getattr(shards, split).tokens)].sum() == said["bytes"]
    assert shards.train.tokens.dtype == np.dtype("<u2")


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    assert module.token_dtype(1 << 16) == np.dtype("<u2")
    assert module.token_dtype((1 << 16) + 1) == np.dtype("<u4")


def test_long_documents_and_small_batches_give_the_same_tokens(corpus_dir, cache, monkeypatch):
    corpus = TextFiles([corpus_dir])
    before = prepare(corpus, BPE(300), cache)
    monkeypatch.setattr("nanochat.data.tokenizer.PIECE", 100)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 1000)
    after = prepare(corpus, BPE(300), cache.with_name("other"))
    assert after.identity == before.identity
    assert (after.train.starts == before.train.starts).all()


def test_the_same_text_is_never_in_both_splits(corpus_dir, cache):
    files = TextFiles([corpus_dir]).files()
    val = next(file for file in files if split_of(file.name) == VAL)
    train = [file for file in files if split_of(file.name) == TRAIN]
    for file in train[:3]:
        file.path.write_bytes(val.path.read_bytes())
    shards = prepare(TextFiles([corpus_dir]), Byte(), cache)
    texts = {split: documents_of(shards, split) for split in ("train", "val")}
    assert not set(texts["train"]) & set(texts["val"])
    assert len(set(texts["train"])) == len(texts["train"])
    assert shards.header["duplicates"] == 3


def test_validation_paths(corpus_dir, cache):
    train = TextFiles([corpus_dir])
    validation = TextFiles([corpus_dir / "part0" / "file0.txt"], "data.val_paths")
    shards = prepare(train, Byte(), cache, validation)
    assert documents_of(shards, "val") == [(corpus_dir / "part0" / "file0.txt").read_text()]
    # what validates does not train, and nothing else is put aside
    assert len(documents_of(shards, "train")) == 59
    assert shards.header["split"] == "paths"
    with pytest.raises(UserError, match="no text that"):
        prepare(TextFiles([corpus_dir / "part1"]), Byte(), cache, TextFiles([corpus_dir], "data.val_paths"))


@pytest.mark.parametrize("lines", [True, False])
def test_one_file_is_cut(tmp_path, cache, lines):
    text = "".join(f"línea {i}" + "\n" * lines for i in range(4000))
    (tmp_path / "one.txt").write_text(text)
    shards = prepare(TextFiles([tmp_path / "one.txt"]), Byte(), cache)
    (train,), (val,) = documents_of(shards, "train"), documents_of(shards, "val")
    assert text.startswith(train)
    assert text.endswith(val)
    gap = len(text) - len(train) - len(val)
    assert 0.19 < gap / (len(text) - len(train)) < 0.21 + 0.02 * lines
    assert 0.93 < len(train) / len(text) < 0.96
    assert train.endswith("\n") == lines
    assert val.startswith("línea") >= lines
    assert shards.header["split"] == "cut"
    assert shards.header["share"] == pytest.approx(len(val.encode()) / len((train + val).encode()), abs=1e-4)


def test_long_documents_are_cut_where_the_share_is_not_as_it_should_be(tmp_path, cache):
    """Without that, a line of 1 MB whose name falls to validation leaves a thousandth of the text to train on."""
    texts = tmp_path / "texts"
    texts.mkdir()
    names = {split: [n for n in (f"{i}.txt" for i in range(200)) if split_of(n) == split] for split in (TRAIN, VAL)}
    (texts / names[VAL][0]).write_text("title\n" + "".join(f"w{i} " for i in range(150_000)))
    for name in names[TRAIN][:3]:
        (texts / name).write_text(f"a line of {name}\n" * 20)
    shards = prepare(TextFiles([texts]), Byte(), cache)
    train, val = documents_of(shards, "train"), documents_of(shards, "val")
    assert len(train) == 4
    assert len(val) == 1
    long = (texts / names[VAL][0]).read_text()
    (part,) = [text for text in train if text.startswith("title")]
    assert len(part) == pytest.approx(0.95 * len(long), rel=0.02)
    assert long.endswith(val[0])
    assert len(long) - len(part) - len(val[0]) == module.GAP
    assert 0.01 < shards.header["share"] < 0.2


def test_a_share_that_is_as_it_should_be_stays(corpus_dir):
    """Even where one document is long."""
    texts = list(TextFiles([corpus_dir]).documents())
    name = next(document.name for document in texts if split_of(document.name) == TRAIN)
    (corpus_dir / name).write_text("a longer line than the others\n" * 400)
    plan = scan(TextFiles([corpus_dir]))
    assert plan.border is None
    assert plan.places[0].tolist() == [split_of(document.name) for document in texts]


@pytest.mark.parametrize("split", [TRAIN, VAL])
def test_many_files_of_one_split_are_split_by_position(tmp_path, cache, split):
    names = [name for name in (f"{i:03}.txt" for i in range(900)) if split_of(name) == split][:30]
    for name in names:
        (tmp_path / name).write_text(f"a line of {name}\n" * 100)
    shards = prepare(TextFiles([tmp_path / name for name in names]), Byte(), cache)
    assert shards.header["split"] == "position"
    train, val = documents_of(shards, "train"), documents_of(shards, "val")
    assert len(train) == 29
    assert len(val) == 2
    assert train[-1].splitlines()[0] == val[0].splitlines()[0] == f"a line of {names[28]}"
    assert len(train[-1]) + len(val[0]) < len(val[1])


def test_lopsided_data_of_the_version_before_is_made_anew(tmp_path, cache, monkeypatch):
    names = {split: next(n for n in (f"{i}.txt" for i in range(200)) if split_of(n) == split) for split in (TRAIN, VAL)}
    (tmp_path / names[VAL]).write_text("a long text\n" * 1000)
    (tmp_path / names[TRAIN]).write_text("a short text\n" * 10)
    corpus = TextFiles([tmp_path / name for name in names.values()])
    with monkeypatch.context() as before:
        before.setattr(module, "_balanced", lambda *a: True)
        before.setattr(
            module, "_header", lambda *a, of=module._header: {k: v for k, v in of(*a).items() if k != "share"}
        )
        before.setattr(module, "_is_lopsided", lambda *a: False)
        old = prepare(corpus, BPE(300), cache)
    assert len(documents_of(old, "train")[0]) == 130
    for _ in range(2):
        new = prepare(corpus, BPE(300), cache)
        assert len("".join(documents_of(new, "train"))) > 10_000
        assert prepare(corpus, new.tokenizer, cache).identity == new.identity != old.identity


def test_nothing_to_read(tmp_path, cache):
    (tmp_path / "latin.txt").write_bytes(b"\xe4")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"data\.paths=.* has no text to use; skipped: latin\.txt \(not UTF-8\)"):
        prepare(TextFiles([tmp_path]), Byte(), cache)
    with pytest.raises(UserError, match=r"data\.paths=.*no text"):
        prepare(TextFiles([tmp_path / "empty.txt"]), Byte(), cache)
    (tmp_path / "fine.txt").write_text("fine text")
    with pytest.raises(UserError, match=r"data\.val_paths=.*no text"):
        prepare(TextFiles([tmp_path]), Byte(), cache, TextFiles([tmp_path / "empty.txt"], "data.val_paths"))
    assert not [path for path in (cache / "data").iterdir() if path.suffix != ".lock"]


def test_what_was_skipped_is_in_the_header(corpus_dir, cache, caplog):
    (corpus_dir / "latin.txt").write_bytes(b"\xe4")
    (corpus_dir / "gone.txt").symlink_to("nowhere")
    (corpus_dir / "empty.txt").touch()
    header = prepare(TextFiles([corpus_dir]), Byte(), cache).header
    assert header["skipped"] == {
        "count": 2,
        "empty": 1,
        "named": {"gone.txt": "No such file or directory", "latin.txt": "not UTF-8"},
    }
    assert "Skipped 2 of the corpus: gone.txt" in caplog.text


def test_compression_is_of_the_validation_text(corpus_dir, cache):
    import gzip
    import lzma

    corpus = TextFiles([corpus_dir])
    shards = prepare(corpus, Byte(), cache)
    text = "\n".join(d.text for d in corpus.documents() if split_of(d.name) == VAL).encode()
    said = shards.header["compression"]
    assert said["bytes"] == len(text)
    assert said["bits_per_byte"]["gzip -9"] == 8 * len(gzip.compress(text, 9)) / len(text)
    best = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    assert said["bits_per_byte"]["xz -9e"] == 8 * len(best) / len(text)


# ---- the cache ------------------------------------------------------------------------------------------------------


def test_the_cache_is_used_until_something_changes(corpus_dir, cache, monkeypatch):
    corpus, builds = TextFiles([corpus_dir]), []
    build = module._build
    monkeypatch.setattr(module, "_build", lambda *a: (builds.append(a), build(*a)))

    def built(corpus=corpus, spec=None) -> bool:
        before = len(builds)
        prepare(corpus, spec or BPE(300), cache)
        return len(builds) > before

    assert built()
    assert not built()
    assert not built(TextFiles([corpus_dir]))
    tokenizer = prepare(corpus, BPE(300), cache).tokenizer
    assert not built(spec=tokenizer)  # the finished tokenizer finds the same shards
    assert built(spec=BPE(301))
    assert built(spec=Byte())
    os.utime(corpus_dir / "part0" / "file0.txt", ns=(1, 1))
    assert built()
    (corpus_dir / "new.txt").write_text("more")
    assert built()
    assert not built()
    (corpus_dir / "new.txt").unlink()
    assert not built()


def test_identity_is_of_the_content_alone(corpus_dir, cache):
    first = prepare(TextFiles([corpus_dir]), BPE(300), cache)
    for path in corpus_dir.rglob("*.txt"):
        os.utime(path, ns=(1, 1))
    second = prepare(TextFiles([corpus_dir]), BPE(300), cache)
    assert first.folder != second.folder
    assert first.identity == second.identity
    assert prepare(TextFiles([corpus_dir]), BPE(301), cache).identity != first.identity
    before = prepare(TextFiles([corpus_dir]), Byte(), cache)
    (corpus_dir / "part0" / "file0.txt").write_text("other text")
    assert prepare(TextFiles([corpus_dir]), Byte(), cache).identity != before.identity


def test_a_corpus_that_changes_while_it_is_read(corpus_dir, cache):
    class Growing(TextFiles):
        reads = 0

        def documents(self, skipped=None):
            self.reads += 1
            documents = list(super().documents(skipped))
            yield from documents if self.reads == 1 else [*documents, Document("late.txt", "late text")]

    class Shrinking(Growing):
        def documents(self, skipped=None):
            documents = list(super().documents(skipped))
            yield from documents if self.reads == 1 else documents[:-2]

    class Touched(TextFiles):
        def documents(self, skipped=None):
            yield from super().documents(skipped)
            os.utime(corpus_dir / "part0" / "file0.txt")

    for kind in (Growing, Shrinking, Touched):
        with pytest.raises(UserError, match="changed while it was read"):
            prepare(kind([corpus_dir]), Byte(), cache)
    assert not [path for path in (cache / "data").iterdir() if path.suffix != ".lock"]


def test_folders_that_cannot_be_used(corpus_dir, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", "/proc/no-such-place"):
        with pytest.raises(UserError, match=r"data\.cache_dir=.*cannot be used"):
            prepare(TextFiles([corpus_dir]), Byte(), place)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.SplitWriter, "write", full)
    with pytest.raises(UserError, match="No space left on device"):
        prepare(TextFiles([corpus_dir]), Byte(), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "data").iterdir() if path.suffix != ".lock"]


def test_a_linked_folder_that_was_deleted_is_built_again(corpus_dir, cache):
    corpus = TextFiles([corpus_dir])
    shards = prepare(corpus, BPE(300), cache)
    tokenizer = shards.tokenizer
    for file in shards.folder.iterdir():
        file.unlink()
    shards.folder.rmdir()
    assert prepare(corpus, tokenizer, cache).identity == shards.identity
    assert prepare(corpus, BPE(300), cache).identity == shards.identity


SCRIPT = """
import logging, sys, time
from pathlib import Path
from nanochat.data import prepare as module
from nanochat.data.sources.text import TextFiles
from nanochat.data.tokenizer import BPE
logging.basicConfig(format="%(message)s")
encode = module._encode
def pause(name):
    print(name, flush=True)
    while name in sys.argv[3:] and not Path(sys.argv[2], name).exists():
        time.sleep(0.01)
def slowly(*args):
    pause("before")
    counts = encode(*args)
    pause("after")
    return counts
module._encode = slowly
print("identity", module.prepare(TextFiles([sys.argv[1]]), BPE(300), sys.argv[2]).identity, flush=True)
"""


def start(corpus_dir: Path, cache: Path, *stops: str) -> subprocess.Popen:
    """A process that prepares, and stops before or after it encodes until there is a file of that name."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(corpus_dir), str(cache), *stops],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_at_once_build_once(corpus_dir, cache):
    first = start(corpus_dir, cache, "after")
    assert first.stdout is not None
    assert [first.stdout.readline() for _ in range(2)] == ["before\n", "after\n"]
    second = start(corpus_dir, cache)
    assert second.stderr is not None
    assert "waiting for it" in second.stderr.readline()
    (cache / "after").touch()
    (out1, err1), (out2, err2) = first.communicate(timeout=60), second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), err1 + err2
    assert out1.startswith("identity ")
    assert out2 == out1
    assert len([p for p in (cache / "data").iterdir() if p.is_dir() and not p.is_symlink()]) == 1


@pytest.mark.parametrize("stop", ["before", "after"])
def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(corpus_dir, cache, stop):
    process = start(corpus_dir, cache, stop)
    assert process.stdout is not None
    while (line := process.stdout.readline()) != f"{stop}\n":
        assert line, "the process ended"
    process.send_signal(signal.SIGKILL)
    process.wait()
    (aside,) = [p for p in (cache / "data").iterdir() if p.is_dir()]
    assert re.match(r"\.text-\w+\.\d+$", aside.name)
    began = time.monotonic()
    shards = prepare(TextFiles([corpus_dir]), BPE(300), cache)
    assert time.monotonic() - began < 10
    assert [p for p in (cache / "data").iterdir() if p.is_dir() and not p.is_symlink()] == [shards.folder]
    assert open_shards(shards.folder).identity == shards.identity


def test_scanning_twice_decides_the_same(corpus_dir):
    corpus = TextFiles([corpus_dir])
    plans = [scan(corpus), scan(corpus)]
    assert plans[0] == plans[1]
    assert DROPPED not in plans[0].places[0]
    assert list(split_documents([corpus], plans[0])) == list(split_documents([corpus], plans[1]))
    assert json.dumps([split for split, _ in split_documents([corpus], plans[0])]).count("1") > 1
