"""Source files, a document each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from nanochat.data.sources.text import TextFiles

# fmt: off
EXTENSIONS = [
    ".c", ".cc", ".cpp", ".cs", ".cu", ".cuh", ".go", ".h", ".hpp", ".java", ".jl", ".js", ".jsx", ".kt", ".lua", ".m",
    ".ml", ".php", ".pl", ".py", ".pyi", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts", ".tsx", ".zig",
]
# fmt: on
"""what is taken from a folder by default"""


class CodeFiles(TextFiles):
    """As `text`, but of a folder only the files of programming languages."""

    kind = "code"

    def __init__(
        self,
        paths: Sequence[str | Path],
        option: str = "data.paths",
        extensions: Iterable[str] | None = None,
        max_file_bytes: int | None = None,
    ) -> None:
        super().__init__(paths, option, EXTENSIONS if extensions is None else extensions, max_file_bytes)


CORPUS = CodeFiles
