"""A file or folder is replaced whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from nanochat.files import anchored, atomic_write, quoted, replacing


def listing(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            file.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert listing(tmp_path) == {"file": "old"}
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert listing(tmp_path) == {"file": "new"}


@pytest.mark.parametrize("before", ["nothing", "a file", "a folder", "a link"])
def test_a_folder_takes_the_place_of_what_was_there(tmp_path: Path, before: str) -> None:
    path = tmp_path / "out"
    if before == "a file":
        path.write_text("old")
    elif before == "a folder":
        (path / "deep").mkdir(parents=True)
        (path / "deep" / "file").write_text("old")
    elif before == "a link":
        path.symlink_to("gone")
    found = listing(tmp_path)

    def write(aside: Path) -> None:
        (aside / "inner").mkdir(parents=True)
        (aside / "inner" / "file").write_text("new")

    def interrupted() -> None:
        with replacing(path) as aside:
            write(aside)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert listing(tmp_path) == found
    with replacing(path) as aside:
        write(aside)
        assert listing(tmp_path).items() >= found.items()
    assert listing(tmp_path) == {"out/inner/file": "new"}
    assert not path.is_symlink()
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_comes_back_when_its_successor_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "file").write_text("old")
    rename = os.rename

    def fail_once(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(OSError, match="No space"), replacing(path) as aside:
        aside.mkdir()
    assert listing(tmp_path) == {"out/file": "old"}
    assert os.listdir(tmp_path) == ["out"]


def test_paths_and_globs_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "a [1]"
    place.mkdir()
    (place / "[x]").mkdir()
    monkeypatch.chdir(place)
    assert anchored("b/c.txt") == f"{place}/b/c.txt"
    assert anchored("*.txt") == f"{tmp_path}/a [[]1]/*.txt"  # the folder's own brackets are no pattern
    assert anchored("[x]") == f"{place}/[x]"  # it exists
    assert anchored("~/x") == "~/x"
    assert anchored("/abs") == "/abs"


PLAIN = ["a", "outputs/2026-11-24/12-00-00-sweep", "/tmp/x/1.5"]
QUOTED = ["a b", "null", "True", "inf", "12", "it's", "a\\b", "a\\'b", "a\\", "ü", "x=1", "a,b", "[a]", "a:b"]


@pytest.mark.parametrize("name", [*PLAIN, *QUOTED])
def test_a_path_as_hydra_reads_it(name: str) -> None:
    text = quoted(Path(name))
    value = OverridesParser.create().parse_override(f"hydra.run.dir={text}").value()
    assert getattr(value, "text", value) == name
    assert text.startswith("'") == (name in QUOTED)
