"""A stand-in for training, and the launcher called in this process."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from nanochat import launch
from nanochat.config.check import Checked, check
from nanochat.errors import UserError
from nanochat.search import Trial

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def quiet_process() -> Iterator[None]:
    """Hydra configures logging for the whole process; put it back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:], root.level = handlers, level
    GlobalHydra.instance().clear()


@pytest.fixture
def runs(monkeypatch, tmp_path: Path) -> list[DictConfig]:
    """Replaces training; the configurations that would have been trained. The working folder is `tmp_path`."""
    seen: list[DictConfig] = []

    def train(given: DictConfig | Checked, folder: Path) -> dict[str, float]:
        place = Path(HydraConfig.get().runtime.output_dir)
        assert folder == place
        checked = given if isinstance(given, Checked) else check(given)
        cfg = OmegaConf.create(checked.values)
        seen.append(cfg)
        if cfg.seed == 13:
            (place / "config.yaml").write_text("half: written\n")
            raise UserError("thirteen is unlucky.")
        if cfg.seed == 14:
            raise RuntimeError("the machine broke")
        if cfg.seed == 15:
            raise KeyboardInterrupt
        if cfg.seed == 16:
            raise SystemExit(143)
        if cfg.seed == 17:
            return {"val/loss": 2.0}
        trial = Trial.here()
        pruned = trial is not None and trial.report(1, 1.0 + cfg.seed)
        if not (place / "config.yaml").exists():
            OmegaConf.save(cfg, place / "config.yaml")
        summary = {
            "status": "pruned" if pruned else "finished",
            "val/loss": 2.0 + cfg.seed,
            "val/bpb": 1.0 + cfg.seed,
            "optim/bytes": 1024,
        }
        (place / "summary.json").write_text(json.dumps(summary))
        return {"val/bpb": 1.0 + cfg.seed}

    fake = ModuleType("nanochat.run")
    fake.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nanochat.run", fake)
    monkeypatch.chdir(tmp_path)
    return seen


@pytest.fixture
def call(capfd) -> Call:
    """Runs the launcher in this process; (exit code, stdout, stderr)."""

    def run(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            code = launch.main(words)
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return run
