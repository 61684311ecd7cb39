"""The network. Imports torch alone: no Lightning, no Hydra."""

from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT

__all__ = ["GPT", "GPTConfig"]
