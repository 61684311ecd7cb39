"""A run folder of a stranger's: nothing that its configuration says is run, read from the environment or written to."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from nanochat import launch
from nanochat.export.cli import export_main
from nanochat.serve.generate import main as generate_main

SAVED = Path(__file__).parent / "fixtures" / "saved_run"
WITNESS = "witness.txt"


class Evil:
    """Pickled, it touches a file when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {WITNESS}",)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder: a stranger's run, files that run code when they are loaded, and a file of the user's."""
    shutil.copytree(SAVED, tmp_path / "evil", symlinks=True)
    (tmp_path / "code.pkl").write_bytes(pickle.dumps(Evil()))
    torch.save(Evil(), tmp_path / "code.pt")
    np.save(tmp_path / "code.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    (tmp_path / "mine.txt").write_text("precious")
    (tmp_path / "mine.py").write_text(f"open({WITNESS!r}, 'w')\n")
    (tmp_path / "logging.yaml").write_text("version: 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SECRET", "the secret")
    yield tmp_path
    sys.modules.pop("mine", None)


def poison(place: Path, key: str, value: Any) -> None:
    """Set a dotted key of the run's configuration."""
    path = place / "evil" / "run" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    node = config
    *parents, last = key.split("/")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def contents(place: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file() and ".pyc" not in path.name
    }


OPEN = "neither nanochat's nor named by your own options"
NO_PART = "is not a part of a run"
OUTSIDE = "is outside of the run folder"
WRITES_NONE = "which no run of nanochat writes"

SHAPES: dict[str, tuple[str, Any, str]] = {
    "torch.load": ("callbacks/x", {"_target_": "torch.load", "f": "code.pt", "weights_only": False}, OPEN),
    "pickle": (
        "callbacks/x",
        {"_target_": "pickle.load", "file": {"_target_": "builtins.open", "file": "code.pkl"}},
        OPEN,
    ),
    "pandas": ("x", {"_target_": "pandas.read_pickle", "filepath_or_buffer": "code.pkl"}, OPEN),
    "numpy": ("callbacks/x", {"_target_": "numpy.load", "file": "code.npy", "allow_pickle": True}, OPEN),
    "joblib": ("callbacks/x", {"_target_": "joblib.load", "filename": "code.pkl"}, OPEN),
    "yaml": (
        "callbacks/x",
        {"_target_": "yaml.unsafe_load", "stream": "!!python/object/apply:os.system ['touch w']"},
        OPEN,
    ),
    "file handler": ("callbacks/x", {"_target_": "logging.FileHandler", "filename": "mine.txt", "mode": "w"}, OPEN),
    "rotating handler": (
        "logger/x",
        {"_target_": "logging.handlers.RotatingFileHandler", "filename": "mine.txt"},
        OPEN,
    ),
    "logging's configuration": ("logger/x", {"_target_": "logging.config.fileConfig", "fname": "logging.yaml"}, OPEN),
    "open": ("callbacks/x", {"_target_": "io.open", "file": "mine.txt", "mode": "w"}, OPEN),
    "pathlib": ("callbacks/x", {"_target_": "pathlib.Path.unlink", "self": {"_target_": "pathlib.Path"}}, OPEN),
    "subprocess": ("callbacks/x", {"_target_": "subprocess.Popen", "args": ["touch", WITNESS]}, OPEN),
    "os.system": ("trainer/profiler", {"_target_": "os.system", "command": f"touch {WITNESS}"}, OPEN),
    "rmtree": ("x", {"_target_": "shutil.rmtree", "path": "."}, OPEN),
    "eval": ("schedule", {"_target_": "builtins.eval", "_args_": [f"open('{WITNESS}', 'w')"]}, OPEN),
    "a chain": (
        "trainer/plugins",
        [
            {
                "_target_": "lightning.pytorch.plugins.AsyncCheckpointIO",
                "checkpoint_io": {
                    "_target_": "functools.partial",
                    "func": {"_target_": "hydra.utils.get_method", "path": "os.system"},
                },
            }
        ],
        OPEN,
    ),
    "inside of an allowed one": ("callbacks/guard/patience", {"_target_": "os.getpid"}, OPEN),
    "positional": (
        "callbacks/guard",
        {"_target_": "nanochat.training.callbacks.guard.NonFiniteGuard", "_args_": [1]},
        "by position",
    ),
    "through our own modules": ("callbacks/x", {"_target_": "nanochat.checkpoint.torch.load", "f": "code.pt"}, NO_PART),
    "through Lightning's": (
        "callbacks/x",
        {"_target_": "lightning.pytorch.trainer.trainer.os.system", "command": "ls"},
        NO_PART,
    ),
    "our own function": ("callbacks/x", {"_target_": "nanochat.launch.main", "argv": ["trainer.max_steps=1"]}, NO_PART),
    "our own classes that are no parts": ("callbacks/x", {"_target_": "nanochat.checkpoint.Path"}, NO_PART),
    "a rule": ("optim/groups/matrices/rule", "mine.Rule", OPEN),
    "a corpus": ("data/corpus", "mine.Corpus", OPEN),
    "a module of the working folder": ("callbacks/x", {"_target_": "mine.Callback"}, OPEN),
    "no name": ("callbacks/x", {"_target_": ["os.system"]}, OPEN),
    "the environment": ("task_name", "${oc.env:SECRET}", WRITES_NONE),
    "the environment in a list": ("data/paths", ["${oc.decode:${oc.env:SECRET}}"], WRITES_NONE),
    "hydra": ("hydra", {"callbacks": {"x": {"_target_": "os.system"}}}, WRITES_NONE),
    "defaults": ("defaults", ["/optim: muon"], WRITES_NONE),
    "a dotted name": ("trainer.max_steps", {"_target_": "mine.Callback"}, WRITES_NONE),
    "the cache": ("data/cache_dir", "elsewhere", OUTSIDE),
    "the cache of losses": ("collider/cache", "elsewhere", OUTSIDE),
    "a logger": ("logger", {"x": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "."}}, OUTSIDE),
    "upwards": (
        "logger",
        {"x": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "evil/run", "name": "../.."}},
        OUTSIDE,
    ),
    "a server": (
        "logger",
        {"x": {"_target_": "lightning.pytorch.loggers.MLFlowLogger", "tracking_uri": "http://x.y"}},
        OUTSIDE,
    ),
    "checkpoints": (
        "callbacks/x",
        {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": "/tmp/x"},
        OUTSIDE,
    ),
    "a profile": (
        "trainer/profiler",
        {"_target_": "lightning.pytorch.profilers.SimpleProfiler", "dirpath": "~", "filename": "x"},
        OUTSIDE,
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_refused_and_nothing_is_touched(place: Path, capfd: pytest.CaptureFixture, shape: str) -> None:
    key, value, said = SHAPES[shape]
    poison(place, key, value)
    before = contents(place)
    for words in (["--resume", "evil/run"], ["trainer.max_steps=9", "--resume=evil/run"]):
        assert launch.main(words) == 2
        err = capfd.readouterr().err
        assert "--resume evil/run: " in err
        assert said in err
        assert "the secret" not in err
    assert contents(place) == before
    assert not (place / WITNESS).exists()
    assert "mine" not in sys.modules


def test_other_commands_do_not_build_what_a_configuration_names(place: Path) -> None:
    poison(place, "callbacks/x", SHAPES["torch.load"][1])
    poison(place, "data/corpus", "mine.Corpus")
    run = str(place / "evil" / "run")
    assert generate_main([run, "--prompt", "the", "--max-tokens", "2"]) == 0
    assert export_main([run, "--to", "gguf", "--type", "f32", "--out", str(place / "x.gguf")]) == 0
    assert not (place / WITNESS).exists()
    assert "mine" not in sys.modules


CALLBACK = f"""
import lightning
open({WITNESS!r}, "w")
class Mine(lightning.Callback):
    def __init__(self, n: int = 1): ...
"""


@pytest.mark.parametrize(
    "trust",
    [
        ["--trust"],
        ["--config-dir", "conf"],
        ["hydra.searchpath=[file://HERE/conf]"],
        ["+callbacks.other._target_=mine.Mine"],
        ["~callbacks.x"],
        ["callbacks.x=null"],
    ],
)
def test_what_the_user_names_himself_is_trusted(
    place: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, trust: list[str]
) -> None:
    (place / "mine.py").write_text(CALLBACK)
    (place / "conf" / "mine").mkdir(parents=True)
    (place / "conf" / "mine" / "on.yaml").write_text("_target_: mine.Mine\n")
    poison(place, "callbacks/x", {"_target_": "mine.Mine", "n": 2})
    monkeypatch.setattr("nanochat.run.train", lambda *_: {})
    data = [f"data.paths=['{place}/evil/text']"]
    assert launch.main(["--resume", "evil/run", *data]) == 2
    assert not (place / WITNESS).exists()
    code = launch.main([*(word.replace("HERE", str(place)) for word in trust), "--resume", "evil/run", *data])
    assert code == 0, capfd.readouterr().err
    assert (place / WITNESS).exists() == ("x" not in trust[0].replace("path", ""))


def test_trust_belongs_to_a_resume(place: Path, capfd: pytest.CaptureFixture) -> None:
    assert launch.main(["--trust", "model=tiny"]) == 2
    assert "--trust believes" in capfd.readouterr().err


def test_the_cache_of_the_user_is_written_to(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default one, and one that holds prepared data."""
    monkeypatch.setattr("nanochat.run.train", lambda *_: {})
    words = ["--resume", "evil/run", f"data.paths=['{place}/evil/text']"]
    for cache in (place / "evil" / "cache", place / "default"):
        poison(place, "data/cache_dir", str(cache))
        monkeypatch.setenv("NANOCHAT_CACHE", str(place / "default"))
        assert launch.main(words) == 0
    assert json.loads((place / "evil" / "mtimes.json").read_text())
