"""Decoding with a KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanochat.checkpoint import build_gpt
from nanochat.errors import UserError
from nanochat.inference.sampling import Sampling
from nanochat.inference.scheduler import Request, Scheduler, Token
from nanochat.inference.slots import Backend, TorchBackend
from nanochat.model.attention import causal_attention
from nanochat.model.bitlinear import BitLinear
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT

if TYPE_CHECKING:
    from nanochat.data.tokenizer import Tokenizer


class Cache:
    """Keys and values of every layer, in buffers of a fixed capacity
    (`nanochat.model.attention.KeyValueCache`).
    """

    def __init__(self, config: GPTConfig, batch: int, capacity: int, like: Tensor) -> None:
        shape = (config.n_layers, batch, capacity, config.n_kv_heads, config.head_dim)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.length = 0
        """positions that every layer has seen"""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v (B, T, KV, head_dim) behind the first `length` positions, and attend to all of them."""
        end = self.length + k.shape[1]
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        return causal_attention(q, self.keys[layer, :, :end], self.values[layer, :, :end])


@torch.no_grad()
def inference_copy(gpt: GPT, activation_scale: str | None = None) -> GPT:
    """A network that computes what `gpt` does, with its ternary matrices de-quantised once.

    `gpt` is left as it is (mode, gradients, hooks); embedding, head and norms are shared with it, the
    matrices are not. Nothing of the copy is compiled.

    Args:
        gpt: any GPT, also one in training.
        activation_scale: "none" computes with float activations, as GGUF files in F32 and F16 do.
    """
    per = activation_scale or gpt.config.activation_scale
    config = replace(gpt.config, int8=False, int8_backward=False, activation_scale=per)
    weights = {name: parameter.detach() for name, parameter in gpt.state_dict().items()}
    for name, module in gpt.named_modules():
        if isinstance(module, BitLinear):
            weights[f"{name}.weight"] = module.shipped_weight().detach()
    copy = build_gpt(config, weights)
    for module in copy.modules():
        if isinstance(module, BitLinear):
            module.ternary = False
    return copy.requires_grad_(False).eval()


class Decoder:
    """A batch of sequences that grows token by token.

    gpt: best an `inference_copy`; batch: sequences, all of the same length; capacity: longest length (the
    model's `seq_len` by default).
    """

    def __init__(self, gpt: GPT, batch: int = 1, capacity: int | None = None) -> None:
        self.gpt = gpt
        capacity = min(capacity or gpt.config.seq_len, gpt.config.seq_len)
        self.cache = Cache(gpt.config, batch, capacity, gpt.norm.weight)
        self.capacity = capacity

    @property
    def length(self) -> int:
        """positions fed so far"""
        return self.cache.length

    @torch.inference_mode()
    def hidden(self, tokens: Tensor) -> Tensor:
        """Append tokens (B, T) and return their hidden states after the final norm (B, T, d).

        Raises `UserError` when they do not fit the capacity.
        """
        end = self.cache.length + tokens.shape[1]
        if end > self.capacity:
            raise UserError(f"a sequence of {end} tokens is longer than the {self.capacity} that fit.")
        hidden = self.gpt.hidden(tokens, self.cache, start=self.cache.length)
        self.cache.length = end
        return hidden

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        """Append tokens (B, T) and return the logits after the last one (B, V), float32."""
        return self.gpt.logits(self.hidden(tokens)[:, -1])

    def truncate(self, length: int = 0) -> None:
        """Forget all but the first `length` positions."""
        self.cache.length = min(length, self.cache.length)


def generate_tokens(
    network: GPT | Backend,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
    stop_id: int | None = None,
    vocab_limit: int | None = None,
) -> Iterator[list[int | None]]:
    """Continue several prompts at once, giving each sequence's new token as soon as it is drawn.

    Every item has one entry a sequence: its next token, or None while its prompt is still being read and
    after the sequence has ended (with `stop_id`, which is not given, or with `max_tokens`). Every sequence
    draws from its own generator, seeded with seed + its index, and gets what it would get alone; torch's
    global generator is not touched. Raises `UserError` for a prompt of no tokens, and for logits that are not finite.

    A sequence that fills the model's `seq_len` is read again from its last half, at positions from 0: what is
    written depends on at most the last `seq_len` tokens, also of a longer prompt.

    Args:
        network: a GPT, best an `inference_copy`, or what runs one, with a free slot for each prompt.
        prompts: token ids, at least one a prompt.
        max_tokens: new tokens a sequence.
        stop_id: token that ends a sequence.
        vocab_limit: tokens from this id on are never drawn (a model's vocabulary can be wider than its
            tokenizer's). A backend has a limit of its own.
    """
    if not prompts:
        raise UserError("a prompt of no tokens cannot be continued: the tokenizer has no document separator.")
    if isinstance(network, GPT):
        network = TorchBackend(network, len(prompts), vocab_limit=vocab_limit)
    scheduler = Scheduler(network)
    item: list[int | None] = []
    failures: list[str] = []

    def request(index: int, prompt: Sequence[int]) -> Request:
        def receive(token: Token) -> bool:
            item[index] = token.id
            return False

        def end(reason: str, message: str | None) -> None:
            if reason == "error":
                failures.append(message or "")

        return Request(
            prompt,
            max_tokens,
            sampling or Sampling(),
            seed + index,
            frozenset() if stop_id is None else frozenset((stop_id,)),
            slide=True,
            on_token=receive,
            on_end=end,
        )

    for index, prompt in enumerate(prompts):
        scheduler.submit(request(index, prompt))
    while scheduler.busy:
        item = [None] * len(prompts)
        scheduler.step()
        if failures:
            raise UserError(failures[0])
        if any(token is not None for token in item):
            yield item


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a prompt, as the beginning of a document: the separator, then the text."""
    return [tokenizer.eot_id, *tokenizer.encode(text)]


def generate_text(
    network: GPT | Backend,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int = 64,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> list[str]:
    """What the model writes after each prompt (without it), up to the document's end or `max_tokens`.

    Safe in the middle of a training run: a GPT, of which a copy writes, keeps its mode and gradients, and torch's
    global generators stay where they are. A backend writes itself (see `generate_tokens`). Prompt i draws with
    seed + i. Raises `UserError` for a model whose logits are not finite.
    """
    if not prompts:
        return []
    tokens = generate_tokens(
        inference_copy(network) if isinstance(network, GPT) else network,
        [encode_prompt(tokenizer, prompt) for prompt in prompts],
        max_tokens,
        sampling,
        seed=seed,
        stop_id=tokenizer.eot_id,
        vocab_limit=tokenizer.vocab_size,
    )
    written: list[list[int]] = [[] for _ in prompts]
    for item in tokens:
        for text, token in zip(written, item, strict=True):
            if token is not None:
                text.append(token)
    return [tokenizer.decode(text) for text in written]
