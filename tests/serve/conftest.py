"""A small trained model on both backends, and a server on a free port of this machine."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import uvicorn

from nanochat.data.tokenizer import BPE, Tokenizer
from nanochat.export import llama_cpp
from nanochat.model import GPT, GPTConfig
from nanochat.serve.app import Server, ServerSettings, create_app
from nanochat.serve.models import Settings, load_model
from tests.inference.helpers import write_run
from tests.serve.strangers import write_gpt2

CONFIG = GPTConfig(vocab_size=320, dim=256, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=256, seq_len=256)
TEXT = (
    "the quick brown fox jumps over the lazy dog. die Straße führt über 🚀 den Fluss.\n"
    "one two three four five six seven eight nine ten.\n"
)


def train(config: GPTConfig, tokenizer: Tokenizer, steps: int = 60) -> GPT:
    """A model that knows the text by heart."""
    gpt = GPT(config, seed=0).train()
    tokens = torch.tensor([tokenizer.eot_id, *tokenizer.encode(TEXT * 40)])
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - 49, (8,), generator=generator)
        batch = torch.stack([tokens[start : start + 49] for start in starts])
        batch[:, 0] = tokenizer.eot_id
        loss = F.cross_entropy(gpt(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return gpt.eval()


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A run folder with a trained ternary model and its tokenizer."""
    tokenizer = BPE(vocab_size=300).build([TEXT])
    gpt = train(dataclasses.replace(CONFIG), tokenizer)
    folder = write_run(tmp_path_factory.mktemp("serve") / "little", gpt)
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="session")
def llama():
    """The real llama.cpp; skipped only where it cannot be had, and never in CI."""
    try:
        llama_cpp.fetch()
        return llama_cpp.load()
    except llama_cpp.LlamaCppUnavailable as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"NO LLAMA.CPP, ITS BACKEND IS NOT PROVEN HERE: {error}")


@pytest.fixture(scope="session")
def stranger(tmp_path_factory) -> Path:
    """A GGUF file that nanochat did not make: another architecture, another kind of tokenizer, a chat template."""
    return write_gpt2(tmp_path_factory.mktemp("stranger") / "stranger.gguf")


class Running:
    """A server that runs in a thread."""

    def __init__(self, server: Server, web: uvicorn.Server, port: int) -> None:
        self.server, self.web, self.port = server, web, port
        self.url = f"http://127.0.0.1:{port}"

    @property
    def engine(self):
        return next(iter(self.server.engines.values()))

    def idle(self, seconds: float = 5.0) -> None:
        """Wait until nothing runs or waits."""
        end = time.monotonic() + seconds
        while any(engine.scheduler.busy for engine in self.server.engines.values()):
            assert time.monotonic() < end, "requests are still under way"
            time.sleep(0.005)


@contextmanager
def serve(load, settings: ServerSettings | None = None, wait: bool = True):
    """Run a server for models that `load` gives."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    server = Server(load, settings or ServerSettings(grace=2.0))
    web = uvicorn.Server(uvicorn.Config(create_app(server), log_level="error", timeout_graceful_shutdown=3, ws="none"))
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    running = Running(server, web, listener.getsockname()[1])
    end = time.monotonic() + 30
    while wait and not server.ready:
        assert server.failure is None, server.failure
        assert time.monotonic() < end
        time.sleep(0.01)
    try:
        yield running
    finally:
        web.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def torch_server(run):
    """Our engine behind HTTP, with eight slots."""
    with serve(lambda: [load_model(run, Settings("torch", slots=8), "little")]) as running:
        yield running


@pytest.fixture(scope="session")
def llama_server(run, llama):
    """llama.cpp behind HTTP, with eight slots."""
    with serve(lambda: [load_model(run, Settings("llama.cpp", slots=8), "little")]) as running:
        yield running


@pytest.fixture(params=["torch", "llama.cpp"])
def served(request) -> Running:
    """Both of them, one after the other."""
    name = "torch_server" if request.param == "torch" else "llama_server"
    return request.getfixturevalue(name)
