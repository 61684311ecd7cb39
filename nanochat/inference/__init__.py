"""Using a trained model: slots of a KV cache, sampling, continuous batching, text."""

from nanochat.inference.engine import Decoder, generate_text, generate_tokens, inference_copy
from nanochat.inference.sampling import Sampling, probabilities
from nanochat.inference.scheduler import Request, Scheduler, Token
from nanochat.inference.slots import Backend, TorchBackend
from nanochat.inference.stream import StopStrings, TextStream

__all__ = [
    "Backend",
    "Decoder",
    "Request",
    "Sampling",
    "Scheduler",
    "StopStrings",
    "TextStream",
    "Token",
    "TorchBackend",
    "generate_text",
    "generate_tokens",
    "inference_copy",
    "probabilities",
]
