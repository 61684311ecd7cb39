"""nanochat zoo: add, list, card, get and push; and everything that a stranger's manifest can try."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import threading
from pathlib import Path

import fsspec
import pytest

from nanochat.cli import main
from nanochat.errors import UserError
from nanochat.zoo import manifest as manifests
from nanochat.zoo import transfer
from nanochat.zoo.card import parse_metric, render
from nanochat.zoo.manifest import Manifest, Metric, decode, read_manifest


def test_add_list_card(run_folder, zoo, capsys):
    metric = "val/bpb=1.52 ± 0.01, three seeds"
    assert main(["zoo", "add", str(run_folder), "--name", "small", "--type", "tq1_0", "--metric", metric]) == 0
    capsys.readouterr()
    assert main(["zoo", "list"]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert row.startswith("small")
    assert "1.52 (1.51 to 1.53)" in row
    weights = zoo / "small" / "small.gguf"
    content = weights.read_bytes()
    for damaged, listed in ((content[:-1] + bytes([content[-1] ^ 1]), True), (content[:-1], False)):
        weights.write_bytes(damaged)  # a list compares sizes; whoever uses the model compares hashes
        assert main(["zoo", "list"]) == 0
        out, err = capsys.readouterr()
        assert ("small" in out, "its size is not the manifest's" in err) == (listed, not listed)
        assert main(["zoo", "card", "zoo:small"]) == 2
        assert "its hash is not the manifest's" in capsys.readouterr().err
    weights.write_bytes(content)
    assert main(["zoo", "card", "zoo:small"]) == 0
    card = capsys.readouterr().out
    for text in ("license: mit", "| val/bpb | 1.52 | 1.51 to 1.53 | three seeds |", "| gzip -9 | 1.9 |", "PSF-2.0",
                 "python train.py experiment=tiny 'data.paths=[a b]'", "the run and the file"):  # fmt: skip
        assert text in card
    assert "secret" not in card
    assert card.count("val/bpb") == 1
    found = read_manifest(zoo / "small")
    assert set(found.files) == {
        "small.gguf", "model.json", "tokenizer.json", "chat_template.jinja", "README.md"
    }  # fmt: skip
    assert not [path for path in (zoo / "small").iterdir() if path.suffix in (".ckpt", ".pt", ".pkl", ".bin")]


def test_the_card_of_a_run(run_folder, zoo, capsys):
    assert main(["zoo", "card", str(run_folder), "--name", "other", "--out", "card.md"]) == 0
    assert "# other" in Path("card.md").read_text()
    assert not zoo.exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--name", "Small"], "not a model's name"),
        (["--name", "../up"], "not a model's name"),
        (["--name", "con"], "not a model's name"),
        (["--name", "small", "--metric", "good"], "is not a figure"),
        (["--name", "small", "--licence", "a b"], "SPDX"),
        (["--name", "small", "--report", "none.html"], "no such file"),
        (["--name", "small", "--package", "--out", "x"], "exclude"),
        (["--name", "small", "--data", "text"], "KEY=TEXT"),
    ],
)
def test_add_refuses(run_folder, zoo, words, sentence, capsys):
    assert main(["zoo", "add", str(run_folder), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not zoo.exists()


def test_a_packaged_model_has_a_limit(run_folder, zoo, monkeypatch, capsys):
    monkeypatch.setattr("nanochat.zoo.cli.PACKAGED_LIMIT", 1000)
    assert main(["zoo", "add", str(run_folder), "--name", "small", "--package"]) == 2
    assert "more than 1,000" in capsys.readouterr().err
    assert not list((zoo.parent / "package").iterdir())


def test_push_and_get_a_folder(added, zoo, capsys):
    shutil.copytree(added, zoo / "small")
    assert main(["zoo", "push", "small", "shared"]) == 0
    command = capsys.readouterr().out.split()
    assert main(["zoo", "push", "small", "shared"]) == 2
    assert main(["zoo", "push", "small", "shared", "--force"]) == 0
    assert main(["zoo", "list", "shared"]) == 0
    assert command[-1] in capsys.readouterr().out
    shutil.rmtree(zoo / "small")
    assert main(command[1:]) == 0
    for path in added.iterdir():
        assert (zoo / "small" / path.name).read_bytes() == path.read_bytes()
    assert main(command[1:]) == 2
    assert main([*command[1:-1], "0" * 64, "--force"]) == 2
    assert "not the one named by --sha256" in capsys.readouterr().err


def test_push_and_get_by_url(added, zoo):
    shutil.copytree(added, zoo / "small")
    assert main(["zoo", "push", "small", "memory://bucket/zoo"]) == 0
    assert main(["zoo", "get", "memory://bucket/zoo/small", "--out", "copy"]) == 0
    assert (Path("copy") / "small" / "small.gguf").read_bytes() == (added / "small.gguf").read_bytes()


@pytest.mark.parametrize("place", ["shared", "memory://precious"])
def test_a_forced_push_replaces_models_alone(place, added, zoo, capsys):
    """A folder of somebody's own stays as it is, whatever --force says."""
    shutil.copytree(added, zoo / "small")
    system, root = fsspec.core.url_to_fs(place)
    system.makedirs(f"{root}/small")
    system.pipe_file(f"{root}/small/notes.txt", b"mine")
    assert main(["zoo", "push", "small", place, "--force"]) == 2
    error = capsys.readouterr().err
    assert "is not a model of a zoo" in error
    assert error.count("\n") == 1
    assert system.cat_file(f"{root}/small/notes.txt") == b"mine"


def test_a_failed_upload_leaves_nothing(added, zoo, monkeypatch):
    import fsspec

    system = fsspec.filesystem("memory")

    def fail(self, local, remote, **options):
        if remote.endswith("README.md"):
            raise OSError("the line was cut")
        type(system).pipe_file(self, remote, Path(local).read_bytes())

    shutil.copytree(added, zoo / "small")
    monkeypatch.setattr(type(system), "put_file", fail)
    with pytest.raises(UserError, match="the line was cut"):
        transfer.push_model("small", "memory://broken")
    assert not system.exists("/broken/small")


@pytest.fixture
def web(tmp_path):
    """A web server of the folder `served`, without ranges; its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path / "served"))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_get_from_a_web_server(added, zoo, web, capsys):
    shutil.copytree(added, Path("served") / "small")
    assert main(["zoo", "get", f"{web}/small"]) == 0
    assert (zoo / "small" / "small.gguf").read_bytes() == (added / "small.gguf").read_bytes()
    assert main(["zoo", "get", f"{web}/none"]) == 2
    assert "is not there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "source", ["http://127.0.0.1:1/small", "nope://x", "zip://a::b.zip", "hf:one", "missing", "zoo:x"]
)
def test_a_place_that_cannot_be_read(zoo, source, capsys):
    assert main(["zoo", "get", source, "--out", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not Path("x").exists()


def changed(added: Path, place: Path, change) -> Path:
    """A copy of a model whose manifest was changed."""
    shutil.copytree(added, place)
    values = json.loads((place / "manifest.json").read_text())
    change(values, place)
    (place / "manifest.json").write_text(json.dumps(values))
    return place


def escape(name):
    def change(values, place):
        values["files"][name] = values["files"].pop("README.md")

    return change


def bomb(values, place):
    """A file that goes on after its end."""
    with (place / "README.md").open("ab") as file:
        file.write(b"x" * 50_000_000)


def cut(values, place):
    (place / "README.md").write_text("short")


def other_bytes(values, place):
    text = bytearray((place / "README.md").read_bytes())
    text[0] ^= 1
    (place / "README.md").write_bytes(text)


def no_gguf(values, place):
    content = b"not a model"
    (place / "small.gguf").write_bytes(content)
    values["files"]["small.gguf"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def huge(values, place):
    values["files"]["README.md"]["size"] = 1 << 50


def missing(values, place):
    (place / "README.md").unlink()


def of_another_format(values, place):
    values["format"] = 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (escape("../../escaped.md"), "not a file name inside"),
        (escape("/tmp/escaped.md"), "not a file name inside"),
        (escape("a\\..\\escaped.md"), "not a file name inside"),
        (escape(".hidden.md"), "not a file name inside"),
        (escape("nul.md"), "not a file name inside"),
        (escape("weights.pkl"), "a zoo does not hold"),
        (escape("weights.ckpt"), "a zoo does not hold"),
        (escape("model.zip"), "a zoo does not hold"),
        (lambda values, place: values.update(name="../up"), "not a model's name"),
        (lambda values, place: values.update(weights="README.md"), "malformed"),
        (lambda values, place: values.update(metrics=[{"name": "x", "value": "y"}]), "malformed"),
        (lambda values, place: values.update(files=[]), "malformed"),
        (lambda values, place: values.update(data={"corpus": 3}), "malformed"),
        (bomb, "is longer than"),
        (cut, "ends after"),
        (other_bytes, "its hash is not the manifest's"),
        (no_gguf, "GGUF"),
        (huge, "--max-size"),
        (missing, "is not there"),
        (of_another_format, "format 2"),
    ],
)
def test_get_refuses(added, zoo, change, sentence, capsys):
    source = changed(added, Path("source") / "small", change)
    before = set(Path().rglob("*"))
    assert main(["zoo", "get", str(source)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert set(Path().rglob("*")) - before <= {Path("zoo")}
    assert not zoo.exists() or not list(zoo.iterdir())


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"format": 1}', b"x" * (2 << 20)])
def test_what_is_not_a_manifest(content):
    with pytest.raises(UserError):
        decode(content, "here")


def test_a_manifest_comes_back():
    manifest = Manifest(
        "a", "MIT", "ü", "a.gguf", {"a.gguf": ("0" * 64, 3)}, {"parameters": 5}, {"corpus": "x"},
        (Metric("val/bpb", 1.5, 1.4, 1.6, "how"), Metric("b", 2.0)), {"train": "x"}, "2026-01-01", "1",
    )  # fmt: skip
    assert decode(manifest.encode(), "here") == manifest


@pytest.mark.parametrize(
    ("text", "metric"),
    [
        ("val/bpb=1.5", Metric("val/bpb", 1.5)),
        ("val/bpb = 1.5 ± 0.25, three seeds", Metric("val/bpb", 1.5, 1.25, 1.75, "three seeds")),
        ("a=1e-3+-1e-4", Metric("a", 0.001, 0.0009, 0.0011)),
    ],
)
def test_metrics_are_parsed(text, metric):
    assert parse_metric(text) == metric


def test_a_card_is_plain_text():
    evil = "<script>|`\x1b[2J\nx"
    card = render(
        Manifest("a", "MIT", evil, "a.gguf", {}, {"m": evil}, {"corpus": evil}, (Metric(evil, 1.0, how=evil),))
    )
    assert "<script" not in card
    assert "\x1b" not in card
    assert all(line.count(" | ") <= 4 for line in card.splitlines())


def test_names():
    for name in ("a", "stdlib-tiny", "a.b_c", "x" * 64):
        manifests.check_name(name)
    for name in ("", "-a", "a..b", "a/b", "A", "x" * 65, "a.", "nul", "com1", "a\n"):
        with pytest.raises(UserError):
            manifests.check_name(name)


def test_packaged_models_are_small_whole_and_no_pickles():
    from nanochat.zoo.cli import PACKAGED_LIMIT

    for folder in (Path(manifests.__file__).parent / "models").glob("*/"):
        manifest = read_manifest(folder)
        manifests.check_files(folder, manifest)
        assert manifest.name == folder.name
        assert {path.name for path in folder.iterdir()} == {*manifest.files, manifests.MANIFEST}
        assert manifest.files[manifest.weights][1] <= PACKAGED_LIMIT


def test_packaged_models_write(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_ZOO", str(tmp_path))
    for folder in (Path(manifests.__file__).parent / "models").glob("*/"):
        assert main(["generate", f"zoo:{folder.name}", "--prompt", "def ", "--max-tokens", "8", "--seed", "1"]) == 0
        text = capsys.readouterr().out
        assert text.startswith("def ")
        assert len(text) > 8
