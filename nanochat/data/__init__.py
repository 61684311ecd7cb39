"""Text -> tokens -> batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanochat.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanochat.data.module import DataModule

__all__ = ["DataModule", "Tokenizer"]


def __getattr__(name: str) -> Any:
    """Lightning is imported with the DataModule: who only decodes tokens does without it."""
    if name == "DataModule":
        from nanochat.data.module import DataModule

        return DataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
