"""Every option of every group is instantiated and takes one optimizer step on a two-layer model."""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch
import zstandard
from hydra import compose, initialize_config_dir

from nanochat.config.schema import CONF, DEFAULTS
from nanochat.data import gpt2
from nanochat.errors import UserError
from nanochat.run import train
from tests.runs import read_state, words, write_text

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
OPTIONS = [
    (group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml")) if path.stem != "base"
]


def needs(group: str, option: str, place: Path, monkeypatch) -> list[str]:
    """What an option needs beyond a tiny run: files of its own, or a size that fits."""
    if (group, option) == ("data", "stdlib"):
        library = write_text(place / "library")
        for file in library.glob("*.txt"):
            file.rename(file.with_suffix(".py"))
        monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(library)})
        return []
    if (group, option) == ("data", "code"):
        source = place / "source"
        source.mkdir()
        for i in range(30):
            (source / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 5)
        return [f"data.paths=['{source}']"]
    if (group, option) == ("data", "jsonl"):
        lines = "".join(json.dumps({"text": f"number {i} and more words " * 5}) + "\n" for i in range(60)).encode()
        (place / "a.jsonl.gz").write_bytes(gzip.compress(lines))
        (place / "b.jsonl.zst").write_bytes(zstandard.compress(lines.replace(b"number", b"figure")))
        return [f"data.paths=['{place}/*.jsonl.*']"]
    return []


def overrides_of(group: str, option: str, place: Path, monkeypatch) -> list[str]:
    """The option, on top of a tiny run."""
    own = [*words(place), *needs(group, option, place, monkeypatch)]
    if group in ("data", "tokenizer", "trainer"):
        own = [o for o in own if not o.startswith(f"{group}=")]
    if option == "synthetic":
        own = [o for o in own if not o.startswith(("data.paths", "data.cache_dir", "model.vocab_size"))]
        own += ["model.vocab_size=64"]
    if option == "stdlib":
        own = [o for o in own if not o.startswith("data.paths")]
    if group == "experiment":
        own = [o for o in own if o != "tokenizer=byte"]
        own += ["tokenizer.vocab_size=300", "data.seq_len=32", "trainer.accumulate_grad_batches=1"]
    if option == "overfit":
        own += ["data.seq_len=32"]
    if option == "profiler":
        own += [f"trainer.profiler.dirpath='{place}'"]
    if "galore" in option or (group == "experiment" and option in ("d20-e3-full", "large-7b")):
        own += ["optim.rank=16"]  # below the width
    return [f"{'' if group in DEFAULTS else '+'}{group}={option}", *own, "trainer.max_steps=1"]


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=["-".join(o) for o in OPTIONS])
def test_one_step(group, option, tmp_path, monkeypatch):
    if (group, option) == ("trainer", "gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA here; that trainer=gpu is then refused is tested with the configuration")
    if (group, option) == ("logger", "wandb"):
        monkeypatch.setenv("WANDB_MODE", "offline")
    if (group, option) == ("tokenizer", "gpt2"):
        try:
            gpt2.fetch()
        except UserError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "place"
    place.mkdir()
    folder = tmp_path / "run"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides_of(group, option, place, monkeypatch))
    found = train(cfg, folder)
    assert torch.isfinite(torch.tensor(list(found.values()))).all()
    if (group, option) == ("callbacks", "none"):
        return
    state = read_state(folder)
    assert state["global_step"] >= 1
    assert all(torch.isfinite(t).all() for t in state["state_dict"].values() if t.is_floating_point())
