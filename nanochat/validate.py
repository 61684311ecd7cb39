"""`nanochat validate`: the whole way once, on this machine: prepare, train, kill, resume, export, verify, generate."""

from __future__ import annotations

import contextlib
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat import cli
from nanochat.checkpoint import read_checkpoint
from nanochat.config.compose import compose
from nanochat.console import Parser
from nanochat.errors import UserError
from nanochat.files import quoted
from nanochat.reports.table import Table
from nanochat.run_folder import read_last_row, read_metrics, read_summary
from nanochat.training.resume import newest_whole

RECIPE = "experiment=validate-e2e"
EVERY = 10
"""steps between two checkpoints"""
PATIENCE = 1800.0
"""seconds that one stage may take"""


class StageError(Exception):
    """A stage did not do what it promises; the message says what was seen."""


@dataclass
class Validation:
    """The stages, each of which returns a sentence.

    Args:
        folder: an empty folder for the run and its files.
        overrides: of the recipe.
        kills: how often the training is killed.
    """

    folder: Path
    overrides: Sequence[str] = ()
    kills: int = 1
    before: dict[int, str] = field(default_factory=dict)
    """step -> loss as the killed processes wrote it"""

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    @property
    def gguf(self) -> Path:
        """The exported file."""
        return self.folder / "run.gguf"

    def stages(self) -> dict[str, Callable[[], str]]:
        """Name -> stage, in their order."""
        names = ["kill"] if self.kills == 1 else [f"kill {number + 1}" for number in range(self.kills)]
        kills = dict.fromkeys(names, self.train_and_kill)
        return {
            "prepare": self.prepare, **kills, "resume": self.resume, "evaluate": self.evaluate, "export": self.export,
            "verify": self.verify, "generate": self.generate,
        }  # fmt: skip

    def prepare(self) -> str:
        """The text as tokens on disk."""
        return _said("data", RECIPE, *self.overrides).splitlines()[0]

    def train_and_kill(self) -> str:
        """Train until a random step, and end the process with SIGKILL."""
        first = self._saved()
        end = int(compose([RECIPE, *self.overrides])["trainer"]["max_steps"])
        goal = random.randint(first + EVERY + 1, max(first + EVERY + 1, min(first + 3 * EVERY, end - 2)))
        with (self.folder / "train.txt").open("a") as log, self._start(log) as process:
            deadline = time.monotonic() + PATIENCE
            while self._last_step() < goal or not (self.run / "checkpoints" / "last.ckpt").exists():
                if process.poll() is not None:
                    raise StageError(f"training ended by itself with code {process.returncode}: {self._log_end()}")
                if time.monotonic() > deadline:
                    process.kill()
                    raise StageError(f"training has not reached step {goal} within {PATIENCE:.0f} s.")
                time.sleep(0.02)
            process.kill()
            process.wait()
        losses = self._losses()
        self._compare(losses)
        self.before.update(losses)
        return f"killed after step {max(losses)}, with a checkpoint of step {self._saved()}"

    def resume(self) -> str:
        """Train to the end; steps that were done before must have the same losses to the last digit."""
        saved = self._saved()
        with (self.folder / "train.txt").open("a") as log, self._start(log) as process:
            if process.wait(PATIENCE) != 0:
                raise StageError(f"the resumed run ended with code {process.returncode}: {self._log_end()}")
        self._compare(self._losses())
        repeated = sum(step > saved for step in self.before)
        return f"from step {saved}; steps done twice, with the same losses to the last digit: {repeated}"

    def evaluate(self) -> str:
        """The run's own last validation."""
        summary = read_summary(self.run)
        found = summary.get("val/bpb")
        if summary.get("status") != "finished" or not found or not 0.0 < found < 8.0:
            raise StageError(f"summary.json says {summary.get('status')}, val/bpb {found}.")
        return f"{found:.4f} bits per byte after {summary['step']} steps"

    def export(self) -> str:
        """A GGUF file."""
        _said("export", str(self.run), "--out", str(self.gguf))
        return f"{self.gguf.stat().st_size / 1e6:.1f} MB"

    def verify(self) -> str:
        """The file against the run."""
        return _said("verify", str(self.gguf), "--run", str(self.run)).strip().splitlines()[-1]

    def generate(self) -> str:
        """The same text twice from the run."""
        words = ("generate", str(self.run), "--prompt", "The ", "--max-tokens", "12", "--seed", "1", "--device", "cpu")
        texts = [_said(*words), _said(*words)]
        if texts[0] != texts[1] or not texts[0].strip():
            raise StageError(f"one seed gave {texts[0]!r} and {texts[1]!r}.")
        return repr(" ".join(texts[0].split())[:60])

    def _start(self, log: Any) -> subprocess.Popen:
        words = [
            "train", RECIPE, *self.overrides, f"hydra.run.dir={quoted(self.run)}", "ckpt_path=auto",
            f"callbacks.checkpoint.every_n_train_steps={EVERY}", "trainer.enable_progress_bar=false",
        ]  # fmt: skip
        return subprocess.Popen([sys.executable, "-m", "nanochat.cli", *words], stdout=log, stderr=subprocess.STDOUT)

    def _losses(self) -> dict[int, str]:
        rows = read_metrics(self.run / "metrics.csv")
        return {int(row["step"]): row["train/loss"] for row in rows if row["train/loss"]}

    def _last_step(self) -> int:
        return int(read_last_row(self.run / "metrics.csv").get("step") or 0)

    def _saved(self) -> int:
        newest = newest_whole(self.run / "checkpoints")  # which may be of no file with a step in its name
        return 0 if newest is None else int(read_checkpoint(newest)["global_step"])

    def _compare(self, losses: dict[int, str]) -> None:
        """Raise `StageError` where a step that was done twice has two losses."""
        for step, loss in self.before.items():
            if step in losses and losses[step] != loss:
                raise StageError(f"step {step} had the loss {loss} before the kill and {losses[step]} after it.")

    def _log_end(self) -> str:
        lines = (self.folder / "train.txt").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing."


def _said(*words: str) -> str:
    """What a command prints; raises `StageError` when it fails."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(list(words))
    if code != 0:
        raise StageError(
            f"nanochat {words[0]} ended with code {code}: {err.getvalue().strip() or out.getvalue().strip()}"
        )
    return out.getvalue()


def _make_empty(folder: Path) -> None:
    """Make a folder, or find it empty and writable; raises `UserError` otherwise."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        full = any(folder.iterdir())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "it is not a folder" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise UserError(f"nanochat validate: {folder} cannot be used: {reason}; give a new folder.") from error
    if full:
        raise UserError(f"nanochat validate: {folder} is not empty; give a new folder.")


def main(argv: list[str]) -> int:
    """Go through the stages; 0 when all did what they promise, 1 at the first that did not."""
    parser = Parser("validate", __doc__)
    parser.add_argument("overrides", nargs="*", help="of the recipe, such as data=text data.paths=[my.txt]")
    parser.add_argument("--folder", type=Path, help="an empty folder for what is made (a temporary one)")
    parser.add_argument("--kills", type=int, default=1, help="how often training is killed (1)")
    options = parser.parse_intermixed_args(argv)
    if not 1 <= options.kills <= 3:
        raise UserError(f"nanochat validate: --kills={options.kills} must lie between 1 and 3.")
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nanochat-")))
        _make_empty(folder)
        compose([RECIPE, *options.overrides])  # a mistake in them is the user's, and said at once
        rows, failed = [], False
        for name, stage in Validation(folder.resolve(), options.overrides, options.kills).stages().items():
            start = time.monotonic()
            try:
                said = stage()
            except StageError as error:
                said, failed = f"FAILED: {error}", True
            rows.append([name, round(time.monotonic() - start, 1), said])
            if failed:
                break
    if options.json:
        stages = [dict(zip(("name", "seconds", "said"), row, strict=True)) for row in rows]
        print(json.dumps({"passed": not failed, "stages": stages}))
    else:
        Table("", ["stage", "seconds", "what happened"], rows).show()
    return int(failed)
