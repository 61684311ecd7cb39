"""Records, one a line, in .jsonl files, which may be compressed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nanochat.data.compressed import damages, open_bytes
from nanochat.data.sources.base import Document, File, FileCorpus, Skipped

LINE_BYTES = 64 << 20
"""a longer line is an error of the file"""


class JsonLines(FileCorpus):
    """One document per line of .jsonl, .jsonl.gz or .jsonl.zst files: the text under `text_key`."""

    kind = "jsonl"
    reader = "JsonLines"

    def __init__(
        self,
        paths: Sequence[str | Path],
        option: str = "data.paths",
        extensions: Iterable[str] | None = None,
        max_file_bytes: int | None = None,
        text_key: str = "text",
    ) -> None:
        super().__init__(paths, option, extensions, max_file_bytes)
        self.text_key = text_key

    def read(self, file: File, skipped: Skipped) -> Iterator[Document]:
        number = 0
        try:
            with open_bytes(file.path) as stream:
                while line := stream.readline(LINE_BYTES + 1):
                    number += 1
                    if len(line) > LINE_BYTES:
                        return skipped.add(f"{file.name}:{number}", f"a line of more than {LINE_BYTES} bytes")
                    name = f"{file.name}:{number}"
                    if line.strip() and (text := self._text(line, name, skipped)):
                        yield Document(name, text)
        except (OSError, *damages()) as error:
            reason = getattr(error, "strerror", None) or str(error) or "damaged"
            skipped.add(f"{file.name} from line {number + 1}", reason)

    def _text(self, line: bytes, name: str, skipped: Skipped) -> str:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            skipped.add(name, "not JSON")
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


CORPUS = JsonLines
