"""Where text comes from: each corpus yields named documents in a fixed order and can be told apart from any other."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import logging
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import zstandard

from nanochat.errors import UserError

log = logging.getLogger(__name__)

CODE_EXTENSIONS = [
    ".py",
    ".rs",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".java",
    ".js",
    ".ts",
    ".tsx",
    ".jsx",
    ".go",
    ".rb",
    ".php",
    ".swift",
    ".kt",
    ".scala",
    ".cs",
    ".jl",
    ".lua",
    ".pl",
    ".r",
    ".sh",
    ".sql",
    ".md",
    ".toml",
    ".yaml",
    ".yml",
]
TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Document(NamedTuple):
    """One text, with a name that is the same on every machine."""

    name: str
    text: str


class Corpus:
    """A source of documents."""

    def __init__(self) -> None:
        self.skipped: list[str] = []
        """names of the files (or records) that could not be read, with the reason; filled by `documents`"""

    def documents(self) -> Iterator[Document]:
        """Every readable document, in a fixed order; unreadable ones are added to `skipped`."""
        raise NotImplementedError

    def fingerprint(self) -> list[list]:
        """What the content depends on, cheaply: names, sizes and times of change. JSON-able."""
        raise NotImplementedError

    def _skip(self, name: str, reason: str) -> None:
        self.skipped.append(f"{name} ({reason})")


class Files(Corpus):
    """One document per file.

    Args:
        paths: files, folders (searched recursively) and globs.
        extensions: of the files taken from folders; None takes all.
        max_bytes: larger files are skipped; None is no limit.
        without: names of folders that are left out.
        option: the configuration key to name in errors.

    Raises `UserError` when a path does not exist or nothing is found.
    """

    def __init__(
        self,
        paths: Sequence[str],
        extensions: Sequence[str] | None = None,
        max_bytes: int | None = None,
        without: frozenset[str] | set[str] = frozenset(),
        option: str = "data.paths",
    ) -> None:
        super().__init__()
        self.paths, self.extensions, self.max_bytes = [str(p) for p in paths], extensions, max_bytes
        self.without, self.option = without, option

    def files(self) -> list[tuple[str, Path]]:
        """(name, path) of every file, sorted by name; names are relative to the path that found them."""
        found: dict[Path, str] = {}
        for given in self.paths:
            expanded = str(Path(given).expanduser())
            roots = [Path(p) for p in sorted(glob.glob(expanded, recursive=True))]
            if not roots and Path(expanded).exists():  # a name with brackets in it
                roots = [Path(expanded)]
            if not roots:
                raise UserError(f"{self.option}: there is nothing at {given!r}.")
            for root in roots:
                if root.is_file():
                    found.setdefault(root.resolve(), root.name)
                    continue
                for path in sorted(root.rglob("*")):
                    relative = path.relative_to(root)
                    if self._wanted(relative) and path.is_file():
                        found.setdefault(path.resolve(), relative.as_posix())
        if not found:
            kinds = f" with one of the extensions {', '.join(self.extensions)}" if self.extensions else ""
            raise UserError(f"{self.option}={self.paths} holds no files{kinds}.")
        return sorted(((name, path) for path, name in found.items()), key=lambda pair: (pair[0], str(pair[1])))

    def _wanted(self, relative: Path) -> bool:
        hidden = any(part.startswith(".") for part in relative.parts)
        return (
            not hidden
            and not self.without.intersection(relative.parts[:-1])
            and (self.extensions is None or relative.suffix in self.extensions)
        )

    def fingerprint(self) -> list[list]:
        return [[name, *_stat(path)] for name, path in self.files()]

    def documents(self) -> Iterator[Document]:
        for name, path in self.files():
            try:
                data = path.read_bytes()
            except OSError as error:
                self._skip(name, error.strerror or "unreadable")
                continue
            if self.max_bytes is not None and len(data) > self.max_bytes:
                self._skip(name, f"{len(data):,} bytes")
                continue
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                self._skip(name, "not UTF-8")
                continue
            if "\0" in text:
                self._skip(name, "binary")
            elif text.strip():
                yield Document(name, text)


class Stdlib(Files):
    """The source of Python's own standard library, without its tests: real text on every machine."""

    def __init__(self) -> None:
        super().__init__([sysconfig.get_paths()["stdlib"]], [".py"], without=TEST_FOLDERS, option="data=stdlib")


class JsonLines(Files):
    """One document per line of .jsonl, .jsonl.gz or .jsonl.zst files.

    Args:
        text_key: the key of each record that holds the text.
    """

    def __init__(self, paths: Sequence[str], text_key: str = "text", option: str = "data.paths") -> None:
        super().__init__(paths, option=option)
        self.text_key = text_key

    def _wanted(self, relative: Path) -> bool:
        endings = (".jsonl", ".jsonl.gz", ".jsonl.zst")
        return super()._wanted(relative) and relative.name.endswith(endings)

    def documents(self) -> Iterator[Document]:
        for name, path in self.files():
            try:
                with _open_lines(path) as lines:
                    for number, line in enumerate(lines, 1):
                        yield from self._record(f"{name}:{number}", line)
            except (OSError, EOFError, zstandard.ZstdError) as error:
                self._skip(name, f"unreadable: {error}")

    def _record(self, name: str, line: bytes) -> Iterator[Document]:
        if not line.strip():
            return
        try:
            text = json.loads(line)[self.text_key]
        except UnicodeDecodeError:
            self._skip(name, "not UTF-8")
        except ValueError:
            self._skip(name, "not JSON")
        except (KeyError, TypeError, IndexError):
            self._skip(name, f"no key {self.text_key!r}")
        else:
            if not isinstance(text, str):
                self._skip(name, f"{self.text_key!r} is no string")
            elif text.strip():
                # a lone surrogate is legal JSON and no text
                yield Document(name, text.encode("utf-8", "replace").decode("utf-8"))


def _open_lines(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(zstandard.open(path, "rb"))  # type: ignore[arg-type]
    return path.open("rb")


def _stat(path: Path) -> list[int]:
    try:
        stat = path.stat()
    except OSError:
        return [-1, -1]
    return [stat.st_size, stat.st_mtime_ns]


def held_out(name: str, every: int = 20) -> bool:
    """Whether a document belongs to validation: a fixed hash of its name, one in `every`."""
    return int(hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest(), 16) % every == 0
