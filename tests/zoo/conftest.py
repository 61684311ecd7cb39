"""A small model with value embeddings, its tokenizer and a chat template, and a zoo of the test's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanochat.data.tokenizer import BPE
from nanochat.model import GPT, GPTConfig
from nanochat.zoo import store
from tests.inference.helpers import write_run

CONFIG = GPTConfig(
    vocab_size=320, dim=256, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=256, seq_len=32, tied=False,
    value_embeddings=1, zero_init=False, head_std=0.1,
)  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
SUMMARY = {
    "step": 7, "val/bpb": 1.5, "val/loss": 2.5, "compression": {"gzip -9": 1.9}, "data": "stdlib: 3 documents",
    "overrides": ["experiment=tiny", "data.paths=[a b]", "hydra.run.dir=/home/me/secret"], "tokens": 123,
}  # fmt: skip


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as training leaves it."""
    folder = tmp_path_factory.mktemp("run") / "small"
    gpt = GPT(CONFIG, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gpt.parameters():
            if parameter.ndim == 1:  # gains that differ
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    write_run(folder, gpt, hyper_parameters={"cfg": {"task_name": "small", "data": {"corpus": "stdlib"}}})
    BPE(300).build(["def f(x):\n    return x\n" * 200]).save(folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(SUMMARY), encoding="utf-8")
    return folder


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's zoo, empty, and a package without models; the working folder is the test's."""
    monkeypatch.setenv("NANOCHAT_ZOO", str(tmp_path / "zoo"))
    monkeypatch.setattr(store, "PACKAGED", tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "zoo"
    assert not list(tmp_path.rglob("*.tmp")), "something half-written was left behind"


@pytest.fixture(scope="session")
def added(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as a model of a zoo's folder, to copy from."""
    from nanochat.export.open_run import open_run
    from nanochat.zoo.add import add_model
    from nanochat.zoo.card import describe

    run = open_run(run_folder)
    return add_model(run, tmp_path_factory.mktemp("source"), describe(run, "small", "MIT"), kind="tq1_0")[0]
