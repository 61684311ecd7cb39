"""The one place that decides a vocabulary size of `auto`."""

from __future__ import annotations

from typing import Any

VOCABULARY = 4096
"""tokens of a tokenizer when neither it nor the model says how many"""
SMALLEST_VOCABULARY = 257
"""256 bytes and the token that separates documents"""


def settle_vocabulary(plain: dict[str, Any]) -> None:
    """Give a tokenizer of size `auto` the model's, in place; `VOCABULARY` where the model's is `auto`, too.

    The other way round, a model of vocabulary `auto` can only be settled once its tokenizer has seen the text.
    """
    tokenizer, model = plain.get("tokenizer"), plain.get("model")
    if isinstance(tokenizer, dict) and tokenizer.get("vocab_size") == "auto":
        size = model.get("vocab_size") if isinstance(model, dict) else None
        tokenizer["vocab_size"] = max(size, SMALLEST_VOCABULARY) if isinstance(size, int) else VOCABULARY
