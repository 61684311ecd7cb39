"""Text -> tokens -> batches."""

from nanochat.data.module import DataModule
from nanochat.data.tokenizer import Tokenizer

__all__ = ["DataModule", "Tokenizer"]
