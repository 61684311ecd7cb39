"""Text files, a document each."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from nanochat.data.compressed import damages, open_bytes
from nanochat.data.sources.base import Document, File, FileCorpus, Skipped

PART_BYTES = 32 << 20
"""a longer file is read as several documents, so that memory does not grow with it"""

_MARKS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_OTHER_FORMATS = {b"PAR1": "parquet is not read; write it as .jsonl and use data=jsonl"}


class TextFiles(FileCorpus):
    """Files in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; .gz and .zst are unpacked."""

    kind = "text"
    reader = "Corpus"

    def read(self, file: File, skipped: Skipped) -> Iterator[Document]:
        """The document of a file, or several of a long one."""
        text, index, decoder = "", 0, None
        try:
            with open_bytes(file.path) as stream:
                while True:
                    data = stream.read(PART_BYTES)
                    where = file.name if index == 0 else f"{file.name} from part {index}"
                    if decoder is None:
                        if reason := _OTHER_FORMATS.get(data[:4]):
                            return skipped.add(where, reason)
                        encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8-sig")
                        decoder = codecs.getincrementaldecoder(encoding)()
                    try:
                        more = decoder.decode(data, final=not data)
                    except UnicodeDecodeError:
                        reason = f"not {encoding.removesuffix('-sig').upper()}"
                        return skipped.add(where, "binary" if encoding == "utf-8-sig" and b"\0" in data else reason)
                    if "\0" in more:
                        return skipped.add(where, "binary")
                    text += more
                    if len(data) == PART_BYTES:
                        cut = text.rfind("\n") + 1 or len(text)
                        yield Document(f"{file.name}#{index}", text[:cut])
                        text, index = text[cut:], index + 1
                    elif not data:
                        return (yield Document(file.name if index == 0 else f"{file.name}#{index}", text))
        except damages() as error:
            skipped.add(file.name, getattr(error, "strerror", None) or str(error) or "damaged")


CORPUS = TextFiles
