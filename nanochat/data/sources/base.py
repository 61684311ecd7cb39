"""What every corpus offers, and what those that read files share.

A corpus of files lists them without reading them (`files`, `fingerprint`) and yields their documents in a fixed order,
in bounded memory, as often as it is asked. What cannot be read as text is skipped, counted and named.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nanochat.data.compressed import ENDINGS as COMPRESSED
from nanochat.errors import UserError

NOT_SOURCE = frozenset({"__pycache__", "node_modules"})


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
    empty: int = 0
    """files without a byte, which are nobody's mistake"""
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


class Corpus(Protocol):
    """A source of documents."""

    kind: str
    """its name in messages and in the names of prepared data: letters, digits, `-` and `_`"""

    def documents(self, skipped: Skipped | None = None) -> Iterator[Document]:
        """The documents in a fixed order, the same ones at every call; what cannot be used is added to `skipped`.

        Raises:
            UserError: there is nothing to read.
        """
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What changes whenever the documents could, as JSON can hold it; cheap, since every start asks for it."""
        ...


def option_of(corpus: Corpus) -> str:
    """The option that a corpus comes from, for messages."""
    return getattr(corpus, "option", "data.corpus")


def origin_of(corpus: Corpus) -> str:
    """The option and its value, for messages."""
    option = option_of(corpus)
    return f"{option}={corpus.kind if option == 'data.corpus' else ','.join(getattr(corpus, 'paths', []))}"


class FileCorpus:
    """Documents out of the user's files; a subclass reads one (`read`).

    Args:
        paths: files, folders and globs (`~` and `**` work).
        option: the option that named the paths, for messages.
        extensions: what to take from folders, such as [".py"]; None takes every file.
        max_file_bytes: larger files are skipped; None takes all.
    """

    kind: str
    reader: str
    """how files are read, a part of the fingerprint: another name reads everything anew"""
    excluded: frozenset[str] = NOT_SOURCE
    """names of folders that are not entered"""

    def __init__(
        self,
        paths: Sequence[str | Path],
        option: str = "data.paths",
        extensions: Iterable[str] | None = None,
        max_file_bytes: int | None = None,
    ) -> None:
        self.option = option
        self.paths = [str(path) for path in paths]
        self.extensions = None if extensions is None else {e if e.startswith(".") else f".{e}" for e in extensions}
        self.max_file_bytes = max_file_bytes

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
                    skipped.add(name, "not a regular file")
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
            if file.size == 0:
                skipped.empty += 1
                continue
            try:
                for document in self.read(file, skipped):
                    if document.text.strip():
                        yield document
            except OSError as error:
                skipped.add(file.name, error.strerror or str(error) or "unreadable")

    def read(self, file: File, skipped: Skipped) -> Iterator[Document]:
        """The documents of one file."""
        raise NotImplementedError

    def fingerprint(self) -> dict[str, Any]:
        """Names, sizes and times of the files, and how they are read."""
        return {
            "kind": self.kind,
            "reader": self.reader,
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
                if not file.startswith(".") and (self.extensions is None or self.extensions & _endings(file)):
                    names.append(Path(folder, file).relative_to(root).as_posix())
        for name in sorted(names):
            yield name, root / name


def _endings(file: str) -> set[str]:
    """The ending of a file's name; of a compressed file also that of what is inside."""
    path = Path(file)
    return {path.suffix} | ({Path(path.stem).suffix} if path.suffix in COMPRESSED else set())


_ESCAPED = re.compile(r"\[([*?[])\]")  # as glob.escape writes them


def _before_magic(parts: Sequence[str]) -> list[str]:
    """The names of the folders that a pattern begins with."""
    kept = []
    for part in parts:
        if glob.has_magic(_ESCAPED.sub("", part)):
            break
        kept.append(_ESCAPED.sub(r"\1", part))
    return kept
