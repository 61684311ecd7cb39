"""Files that may be compressed, by their ending."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import IO, Any

ENDINGS = (".gz", ".zst")


def open_bytes(path: Path) -> IO[bytes]:
    """A file for reading: the content of a .gz or .zst file, else the file itself."""
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


def damages() -> tuple[type[Exception], ...]:
    """What reading a damaged compressed file raises."""
    import zstandard

    return (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)
