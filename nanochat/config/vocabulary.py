"""The one place that decides a vocabulary size of `auto`.

A tokenizer of size `auto` takes the model's. A model of size `auto` takes the tokenizer's, in two steps: before any
text is read it is the size that was asked for (`plan_vocabulary`), afterwards the size that the text gave
(`fit_vocabulary`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate

from nanochat.errors import UserError

if TYPE_CHECKING:
    from nanochat.data import DataModule

log = logging.getLogger(__name__)

AUTO = "auto"
DEFAULT_VOCABULARY = 4096
"""tokens of a tokenizer when neither it nor the model says how many"""
SMALLEST_VOCABULARY = 257
"""256 bytes and the token that separates documents"""


def build_data(plain: dict[str, Any]) -> DataModule:
    """The data with its tokenizer; nothing is read or written.

    In two calls, since Hydra would turn the tokenizer's specification, a dataclass, into a dictionary.
    """
    return instantiate(plain["data"], _partial_=True, _convert_="all")(tokenizer=instantiate(plain["tokenizer"]))


def settle_vocabulary(plain: dict[str, Any]) -> None:
    """Give a tokenizer of size `auto` the model's, in place; the default where the model's is `auto`, too."""
    tokenizer, model = plain.get("tokenizer"), plain.get("model")
    if isinstance(tokenizer, dict) and tokenizer.get("vocab_size") == AUTO:
        size = model.get("vocab_size") if isinstance(model, dict) else None
        tokenizer["vocab_size"] = max(size, SMALLEST_VOCABULARY) if isinstance(size, int) else DEFAULT_VOCABULARY


def plan_vocabulary(plain: dict[str, Any]) -> dict[str, Any]:
    """The configuration with a number for a model of size `auto`, for what works before any text is read."""
    if plain["model"].get("vocab_size") != AUTO:
        return plain
    return {**plain, "model": {**plain["model"], "vocab_size": build_data(plain).planned_vocab_size}}


def fit_vocabulary(plain: dict[str, Any], data: DataModule) -> None:
    """Give a model of size `auto` its tokenizer's, in place; `data` is prepared.

    Raises:
        UserError: the model is too small for its tokenizer.
    """
    size, model = data.vocab_size, plain["model"]
    if model["vocab_size"] == AUTO:
        model["vocab_size"] = size
    elif size > model["vocab_size"]:
        raise UserError(
            f"the tokenizer has {size} tokens, the model only model.vocab_size={model['vocab_size']}; "
            "make the tokenizer smaller (tokenizer.vocab_size) or say model.vocab_size=auto."
        )
    elif size < model["vocab_size"] and size >= plain["tokenizer"].get("vocab_size", 0):
        # where the text was too small for the tokenizer's size, the data has said so
        log.warning(
            "The tokenizer has %d of the model's %d tokens; the rest of the head stays unused "
            "(model.vocab_size=auto takes the tokenizer's).",
            size,
            model["vocab_size"],
        )
