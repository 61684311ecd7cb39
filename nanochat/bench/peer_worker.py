"""Another project's training step in a process of its own; `nanochat.bench.peers` starts this file as a script.

It must import nothing of this package: one of the peers is a package of the same name. Requests come as JSON, one a
line, on stdin; each has one answer, as JSON, on what was stdout when the process began. What the peer prints goes to
stderr.

    {"open": {peer, paths, shape, dtype, compile, batch, accumulate, device, threads}}   -> {"parameters"}
    {"step": {}}                                                      one optimizer step -> {"seconds"}
    {"train": {file, token_dtype, seconds, validation}}                -> {"steps", "tokens", "seconds", "nats"}

An answer {"error": sentence} stands for what went wrong; `missing` is true where the peer cannot be imported.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

WARM_UP_STEPS, DECAY_FRACTION, FLOOR = 20, 0.4, 0.05
"""rates of a peer that is trained: the shape of our own default schedule, by time"""


class Missing(Exception):
    """The peer cannot be imported, or is not what its name says."""


class Litgpt:
    """litgpt's GPT of our shape (SwiGLU, RMSNorm, RoPE; tied where ours is) with torch's fused AdamW, unclipped."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch
        from litgpt import GPT, Config  # type: ignore[import-not-found]
        from litgpt.utils import chunked_cross_entropy  # type: ignore[import-not-found]

        shape = spec["shape"]
        config = Config(
            name="peer",
            block_size=shape["seq_len"],
            vocab_size=shape["vocab_size"],
            padded_vocab_size=shape["vocab_size"],
            n_layer=shape["n_layers"],
            n_head=shape["n_heads"],
            n_query_groups=shape["n_kv_heads"],
            n_embd=shape["dim"],
            intermediate_size=shape["ffn_dim"],
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
        )
        with torch.device(spec["device"]):
            self.module = GPT(config)
        self.module.max_seq_length = shape["seq_len"]
        self.module.apply(self.initialise)
        if shape["tied"]:
            self.module.lm_head.weight = self.module.transformer.wte.weight
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
        self.cross_entropy, self.device = chunked_cross_entropy, spec["device"]
        self.bf16 = spec["dtype"] == "bfloat16"
        self.forward = torch.compile(self.module) if spec["compile"] else self.module

    @staticmethod
    def initialise(module: Any) -> None:
        """GPT-2's initial weights: torch's own for embeddings would start far above the entropy of the vocabulary."""
        import torch

        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.02)

    def loss(self, tokens: Any, targets: Any) -> Any:
        """Mean cross entropy in nats; a target of -100 is ignored."""
        import torch

        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            return self.cross_entropy(self.forward(tokens), targets, chunk_size=0, ignore_index=-100)


class Karpathy:
    """karpathy/nanochat's GPT of our width, depth and heads, with its own feed-forward (4 x dim, squared ReLU), value
    embeddings and untied output matrix, and with its own optimizer (Muon and AdamW)."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch

        gpt = importlib.import_module("nanochat.gpt")
        if not hasattr(gpt, "GPTConfig") or not hasattr(gpt.GPT, "setup_optimizer"):
            raise Missing("its nanochat.gpt has no GPT with setup_optimizer")
        shape = spec["shape"]
        with torch.device("meta"):
            self.module = gpt.GPT(
                gpt.GPTConfig(
                    sequence_len=shape["seq_len"],
                    vocab_size=shape["vocab_size"],
                    n_layer=shape["n_layers"],
                    n_head=shape["n_heads"],
                    n_kv_head=shape["n_kv_heads"],
                    n_embd=shape["dim"],
                    window_pattern="L",
                )
            )
        self.module.to_empty(device=spec["device"])
        self.module.init_weights()
        self.optimizer = self.module.setup_optimizer()
        self.forward = torch.compile(self.module, dynamic=False) if spec["compile"] else self.module

    def loss(self, tokens: Any, targets: Any) -> Any:
        """Mean cross entropy in nats; a target of -100 is ignored."""
        return self.forward(tokens, targets.masked_fill(targets == -100, -1))


PEERS: dict[str, Callable[[dict[str, Any]], Any]] = {"litgpt": Litgpt, "karpathy": Karpathy}


class Worker:
    """The peer of a specification, ready to train."""

    def __init__(self, spec: dict[str, Any]) -> None:
        sys.path[:0] = spec["paths"]
        os.environ["NANOCHAT_DTYPE"] = spec["dtype"]  # read by karpathy/nanochat when it is imported
        if not spec["compile"]:
            os.environ["TORCHDYNAMO_DISABLE"] = "1"  # its optimizer is compiled, otherwise
        import torch

        torch.set_num_threads(spec["threads"])
        torch.manual_seed(0)
        self.spec = spec
        try:
            self.peer = PEERS[spec["peer"]](spec)
        except ImportError as error:
            raise Missing(str(error)) from error
        size = (spec["batch"], spec["shape"]["seq_len"])
        self.batches = [
            tuple(torch.randint(spec["shape"]["vocab_size"], size, device=spec["device"]) for _ in range(2))
            for _ in range(spec["accumulate"])
        ]

    def clock(self) -> float:
        """Seconds, by the clock that our own arms are timed with."""
        import torch

        if self.spec["device"] == "cpu":
            return time.process_time() if self.spec["threads"] == 1 else time.perf_counter()
        getattr(torch, self.spec["device"]).synchronize()
        return time.perf_counter()

    def optimizer_step(self, batches: list[Any]) -> None:
        """Gradients of all micro-batches, then the update."""
        for tokens, targets in batches:
            (self.peer.loss(tokens, targets) / len(batches)).backward()
        self.peer.optimizer.step()
        self.peer.module.zero_grad(set_to_none=True)

    def step(self) -> dict[str, Any]:
        """One optimizer step on random tokens."""
        start = self.clock()
        self.optimizer_step(self.batches)
        return {"seconds": self.clock() - start}

    def train(self, file: str, token_dtype: str, seconds: float, validation: str) -> dict[str, Any]:
        """Train for some seconds of wall clock and validate.

        file: flat tokens of `token_dtype`; windows of them are drawn at random. validation: an .npz with `tokens` and
        `targets` (N, T). The first forward and backward pass, which compiles, and the validation do not count.
        Returns the sum of the validation's nats, too.
        """
        import numpy as np
        import torch

        tokens, length, device = np.memmap(file, token_dtype, "r"), self.spec["shape"]["seq_len"], self.spec["device"]
        draw = np.random.default_rng(0)

        def batch() -> tuple[Any, Any]:
            starts = draw.integers(0, len(tokens) - length, size=self.spec["batch"])
            rows = torch.from_numpy(np.stack([tokens[i : i + length + 1] for i in starts]).astype(np.int64)).to(device)
            return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

        self.peer.loss(*batch()).backward()
        self.peer.module.zero_grad(set_to_none=True)
        rates = [group["lr"] for group in self.peer.optimizer.param_groups]
        start, used, steps = time.perf_counter(), 0.0, 0
        while used < seconds:
            left = 1.0 - used / seconds
            factor = min(1.0, (steps + 1) / WARM_UP_STEPS) * max(FLOOR, min(1.0, left / DECAY_FRACTION))
            for group, rate in zip(self.peer.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            self.optimizer_step([batch() for _ in range(self.spec["accumulate"])])
            if device != "cpu":
                getattr(torch, device).synchronize()
            steps, used = steps + 1, time.perf_counter() - start
        trained = steps * self.spec["batch"] * self.spec["accumulate"] * length
        return {"steps": steps, "tokens": trained, "seconds": used, "nats": self.validate(validation)}

    def validate(self, validation: str) -> float:
        """The sum of the nats of all targets that count."""
        import numpy as np
        import torch

        held = np.load(validation)
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(held["tokens"]), self.spec["batch"]):
                rows = slice(start, start + self.spec["batch"])
                tokens, targets = (
                    torch.from_numpy(held[name][rows].astype(np.int64)).to(self.spec["device"])
                    for name in ("tokens", "targets")
                )
                total += self.peer.loss(tokens, targets).item() * int((targets != -100).sum())
        return total


def main() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        ((request, arguments),) = json.loads(line).items()
        try:
            if request == "open":
                worker = Worker(arguments)
                answer: dict[str, Any] = {"parameters": sum(p.numel() for p in worker.peer.module.parameters())}
            else:
                answer = getattr(worker, request)(**arguments)
        except Missing as error:
            answer = {"error": str(error), "missing": True}
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
