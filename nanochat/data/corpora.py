"""Corpora: where text comes from, as documents with names that stay the same on every machine.

A corpus lists its files without reading them (`files`, `fingerprint`) and yields their documents in a fixed order,
in bounded memory, as often as it is asked. What cannot be read as text is skipped, counted and named.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import json
import os
import re
import stat
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from nanochat.errors import UserError

PART_BYTES = 32 << 20
"""a longer file is read as several documents, so that memory does not grow with it"""

LINE_BYTES = 64 << 20
"""a longer line of a jsonl file is an error of the file"""

# fmt: off
CODE = [
    ".c", ".cc", ".cpp", ".cs", ".cu", ".cuh", ".go", ".h", ".hpp", ".java", ".jl", ".js", ".jsx", ".kt", ".lua", ".m",
    ".ml", ".php", ".pl", ".py", ".pyi", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts", ".tsx", ".zig",
]
# fmt: on
"""what `code` takes from a folder by default"""

NOT_SOURCE = frozenset({"__pycache__", "node_modules"})
NOT_LIBRARY = NOT_SOURCE | {"test", "tests", "idle_test", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Document:
    """A text that is a whole of its own."""

    name: str
    text: str


@dataclass(frozen=True)
class File:
    """A file of a corpus, not yet read; `name` is relative to the folder that was given."""

    name: str
    path: Path
    size: int
    mtime_ns: int


@dataclass
class Skipped:
    """What could not be used: how much of it, and the first names with their reasons."""

    count: int = 0
    named: dict[str, str] = field(default_factory=dict)
    limit: int = 1000
    per_file: int = 20
    """lines of a file that are named: a damaged one must not hide what else is wrong"""
    _lines: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, reason: str) -> None:
        """One more: a file, or `file:line`."""
        self.count += 1
        file, _, line = name.rpartition(":")
        self._lines[file] += bool(line.isdigit())
        if len(self.named) < self.limit and not (line.isdigit() and self._lines[file] > self.per_file):
            # a file's name need not be UTF-8; a message has to be
            self.named.setdefault(name.encode(errors="backslashreplace").decode(), reason)

    def __str__(self) -> str:
        shown = [f"{name} ({reason})" for name, reason in list(self.named.items())[:5]]
        more = f" and {self.count - len(shown)} more" if self.count > len(shown) else ""
        return ", ".join(shown) + more


class Corpus:
    """Documents out of files.

    Args:
        kind: the name under which `data.corpus` knows it.
        paths: files, folders and globs (`~` and `**` work).
        option: the option that named the paths, for messages.
        extensions: what to take from folders, such as [".py"]; None takes every file.
        max_file_bytes: larger files are skipped; None takes all.
        excluded: names of folders that are not entered.
    """

    def __init__(
        self,
        kind: str,
        paths: Sequence[str | Path],
        option: str = "data.paths",
        extensions: Iterable[str] | None = None,
        max_file_bytes: int | None = None,
        excluded: frozenset[str] = NOT_SOURCE,
    ) -> None:
        self.kind, self.option = kind, option
        self.paths = [str(path) for path in paths]
        self.extensions = None if extensions is None else {e if e.startswith(".") else f".{e}" for e in extensions}
        self.max_file_bytes, self.excluded = max_file_bytes, excluded

    def files(self, skipped: Skipped | None = None) -> list[File]:
        """The files in the order in which they are read: by argument, then by name.

        Raises:
            UserError: a path that is not there, or a glob without a match.
        """
        skipped = Skipped() if skipped is None else skipped
        found: dict[str, File] = {}
        for argument in self.paths:
            for name, path in self._expand(argument, skipped):
                try:
                    status = path.stat()
                except OSError as error:
                    skipped.add(name, error.strerror or "unreadable")
                    continue
                if not stat.S_ISREG(status.st_mode):
                    skipped.add(name, "no regular file")
                elif self.max_file_bytes is not None and status.st_size > self.max_file_bytes:
                    skipped.add(name, f"more than {self.max_file_bytes} bytes")
                else:
                    # two paths that overlap must not give a file twice
                    found.setdefault(os.path.realpath(path), File(name, path, status.st_size, status.st_mtime_ns))
        return list(found.values())

    def documents(self, skipped: Skipped | None = None) -> Iterator[Document]:
        """The documents that hold more than white space, in order."""
        skipped = Skipped() if skipped is None else skipped
        for file in self.files(skipped):
            try:
                for document in self.read(file, skipped):
                    if document.text.strip():
                        yield document
            except OSError as error:
                skipped.add(file.name, error.strerror or str(error) or "unreadable")

    def read(self, file: File, skipped: Skipped) -> Iterator[Document]:
        """The documents of one file."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        text, index = "", 0
        with open(file.path, "rb") as stream:
            while True:
                data = stream.read(PART_BYTES)
                where = file.name if index == 0 else f"{file.name} from part {index}"
                if b"\0" in data:
                    return skipped.add(where, "binary")
                try:
                    text += decoder.decode(data, final=not data)
                except UnicodeDecodeError:
                    return skipped.add(where, "not UTF-8")
                if len(data) == PART_BYTES:
                    cut = text.rfind("\n") + 1 or len(text)
                    yield Document(f"{file.name}#{index}", text[:cut])
                    text, index = text[cut:], index + 1
                elif not data:
                    return (yield Document(file.name if index == 0 else f"{file.name}#{index}", text))

    def fingerprint(self) -> dict[str, Any]:
        """What changes whenever the documents could: names, sizes and times of the files, and how they are read."""
        return {
            "kind": self.kind,
            "reader": type(self).__name__,
            "files": [[file.name, file.size, file.mtime_ns] for file in self.files()],
        }

    def _expand(self, argument: str, skipped: Skipped) -> Iterator[tuple[str, Path]]:
        path = Path(os.path.expanduser(argument))  # Path's own raises for an unknown user
        if os.path.isdir(path):
            yield from self._walk(path, skipped)
        elif os.path.lexists(path):
            yield path.name, path
        elif glob.has_magic(argument):
            fixed = Path(*_before_magic(path.parts))
            matches = sorted(match for match in glob.glob(str(path), recursive=True) if not os.path.isdir(match))
            if not matches:
                raise UserError(f"{self.option}={argument} matches no file.")
            for match in matches:
                yield Path(os.path.relpath(match, fixed)).as_posix(), Path(match)
        else:
            raise UserError(f"{self.option}={argument} does not exist; give a file, a folder or a glob.")

    def _walk(self, root: Path, skipped: Skipped) -> Iterator[tuple[str, Path]]:
        def unreadable(error: OSError) -> None:
            skipped.add(os.path.relpath(error.filename, root), error.strerror or "unreadable")

        names = []
        # does not follow links to folders: they make loops, and text that counts twice
        for folder, folders, files in os.walk(root, onerror=unreadable):
            folders[:] = [f for f in folders if not f.startswith(".") and f not in self.excluded]
            for file in files:
                if not file.startswith(".") and (self.extensions is None or Path(file).suffix in self.extensions):
                    names.append(Path(folder, file).relative_to(root).as_posix())
        for name in sorted(names):
            yield name, root / name


_ESCAPED = re.compile(r"\[([*?[])\]")  # as glob.escape writes them


def _before_magic(parts: Sequence[str]) -> list[str]:
    """The names of the folders that a pattern begins with."""
    kept = []
    for part in parts:
        if glob.has_magic(_ESCAPED.sub("", part)):
            break
        kept.append(_ESCAPED.sub(r"\1", part))
    return kept


class JsonLines(Corpus):
    """One document per line of .jsonl, .jsonl.gz or .jsonl.zst files: the text under `text_key`."""

    def __init__(self, *args: Any, text_key: str = "text", **options: Any) -> None:
        super().__init__(*args, **options)
        self.text_key = text_key

    def read(self, file: File, skipped: Skipped) -> Iterator[Document]:
        number = 0
        try:
            with _open(file.path) as stream:
                while line := stream.readline(LINE_BYTES + 1):
                    number += 1
                    if len(line) > LINE_BYTES:
                        return skipped.add(f"{file.name}:{number}", f"a line of more than {LINE_BYTES} bytes")
                    name = f"{file.name}:{number}"
                    if line.strip() and (text := self._text(line, name, skipped)):
                        yield Document(name, text)
        except (EOFError, zlib.error, OSError, _zstd_error()) as error:
            reason = getattr(error, "strerror", None) or str(error) or "damaged"
            skipped.add(f"{file.name} from line {number + 1}", reason)

    def _text(self, line: bytes, name: str, skipped: Skipped) -> str:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            skipped.add(name, "no JSON")
            return ""
        text = record.get(self.text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            skipped.add(name, f"no text under {self.text_key!r}")
            return ""
        try:
            text.encode()
        except UnicodeEncodeError:
            skipped.add(name, "half a surrogate pair")
            return ""
        return text

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"text_key": self.text_key}


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(path))
    return open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """The content of a .zst file; unlike the library's own reader it raises EOFError where a frame is cut off."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._file = open(path, "rb")  # noqa: SIM115 - closed by `close`
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = (self._frame.unused_data if self._frame is not None and self._frame.eof else b"") or (
                self._file.read(1 << 14)
            )
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("Compressed file ended in the middle of a frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(data))
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


def standard_library() -> Corpus:
    """The running Python's own library without its tests: some 12 MB of real text on every machine."""
    return Corpus("stdlib", [sysconfig.get_paths()["stdlib"]], "data.corpus", extensions=[".py"], excluded=NOT_LIBRARY)


KINDS: dict[str, Callable[..., Corpus]] = {"text": Corpus, "code": Corpus, "jsonl": JsonLines}
"""corpora that read a user's files; each is called as `KINDS[kind](kind, paths, option, **options)`"""
