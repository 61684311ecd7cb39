"""Using a trained model: a KV cache, sampling, text."""

from nanochat.inference.engine import Decoder, generate_text, generate_tokens, inference_copy
from nanochat.inference.sampling import Sampling, probabilities

__all__ = ["Decoder", "Sampling", "generate_text", "generate_tokens", "inference_copy", "probabilities"]
