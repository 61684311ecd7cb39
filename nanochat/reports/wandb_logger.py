"""Weights & Biases: one W&B run for a run folder, however often it is resumed, with every row exactly once."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import WandbLogger as LightningLogger

from nanochat.config.schema import choices
from nanochat.errors import UserError
from nanochat.files import atomic_write
from nanochat.reports import wandb_account, wandb_files
from nanochat.reports.curves import curve
from nanochat.reports.header import tokens_per_step
from nanochat.run_folder import as_float, read_mapping, read_metrics, read_summary

log = logging.getLogger(__name__)

RECORD = "wandb.json"
"""in a run's folder: which W&B run is its own"""
SECTIONS = ("train", "val", "mtp", "collider", "ternary", "optim", "memory")
"""beginnings of the names of metrics, each with the tokens as its axis"""
STEP = "trainer/global_step"
KINDS = ("train", "val", "samples")
"""of rows: numbers of training, of a validation, samples"""
INIT_TIMEOUT = 30.0
"""seconds that the client has to make a run, once the server has answered"""
SUMMARY = ("status", "parameters", "tokens", "seconds", "data", "commit")
"""keys of summary.json in W&B's summary, beside the last metrics and the figures of compression"""
FILES = ("config.yaml", "model.json", "tokenizer.json", "chat_template.jinja")
"""what a checkpoint needs beside it, in its artifact"""


class WandbLogger(LightningLogger):
    """Lightning's logger, with what a run of nanochat needs.

    A row's `_step` is its optimizer step, and `tokens` beside it is the axis of the charts. The W&B run's id is kept
    in the run folder, so that a resume continues it: rows that W&B has are not logged again, and those that a kill has
    lost on the way are taken from metrics.csv. Of an attempt that diverged W&B keeps the rows.

    A resume may be offline where the session before was online, and the other way round. Offline, the rows that an
    online session gave to the client count as uploaded. Online, the server's last row counts; what offline sessions
    have beyond it is logged from metrics.csv, and their files are marked as synced, so that `wandb sync` adds nothing
    twice.

    Args:
        project, name, id: of the W&B run.
        save_dir: where the client's folder `wandb` lies.
        offline: needs neither an account nor a network. `auto`: online where that is possible, else offline.
        log_model: log the last checkpoint as an artifact when the run ends; online with its data as an input.
        timeout: seconds to wait for the server's first answer.
        **options: of `wandb.init`: entity, group, tags, job_type, notes, ...

    Raises:
        UserError: there is no account or no network, or the server does not accept the key.
    """

    def __init__(
        self,
        project: str = "nanochat",
        name: str | None = None,
        save_dir: str = ".",
        offline: bool | Literal["auto"] = False,
        id: str | None = None,
        log_model: bool = False,
        timeout: float = 10.0,
        **options: Any,
    ) -> None:
        if timeout <= 0:
            raise UserError(f"logger.wandb.timeout={timeout} must be above 0.")
        # Lightning's own `offline` would set WANDB_MODE for all later runs of the process
        super().__init__(name=name, save_dir=save_dir, project=project, id=id, **options)
        self.artifacts = log_model
        self.offline = wandb_account.is_offline({"offline": offline, **options})
        self._forced = id
        self._folder: Path | None = None
        self._tokens = 1
        self._steps: dict[str, int] = {}
        """kind of row -> the last step of which W&B has one"""
        self._best: dict[str, float] = {}
        self._fill = False
        self._replaced: list[Path] = []
        """files of offline sessions whose rows this one logs online"""
        if not self.offline:
            import wandb

            url = wandb_account.server() or wandb.setup().settings.base_url
            problem = wandb_account.problem(url, timeout)
            if problem is not None and offline == "auto":
                log.warning("W&B: %s; the run is logged offline (`wandb sync` uploads it later).", problem)
                self.offline = True
            elif problem is not None:
                raise UserError(
                    f"W&B cannot be used: {problem}; log in with `wandb login`, or say logger.wandb.offline=true, "
                    "which needs neither an account nor a network."
                )
        if self.offline:
            self._wandb_init.setdefault("mode", "offline")
        elif "settings" not in options:
            import wandb

            self._wandb_init["settings"] = wandb.Settings(init_timeout=INIT_TIMEOUT)

    @rank_zero_only
    def begin(self, folder: Path, plain: dict[str, Any]) -> None:
        """Start the W&B run of a run folder, or continue it.

        Args:
            plain: the run's resolved configuration.

        Raises:
            UserError: the folder cannot be written.
        """
        self._folder, self._tokens = folder, tokens_per_step(plain)
        record = read_mapping(folder / RECORD)
        known = self._own(record) if plain.get("ckpt_path") is not None else None
        if known is not None:
            self._id = self._wandb_init["id"] = known
            self._best = _best_of(folder)
        run = self.experiment
        if known is not None:
            self._fill = True
            self._steps = self._logged(known, record)
            self._announce_change(known, record)
        try:
            self._write_record()
        except OSError as error:
            raise UserError(f"{folder / RECORD} cannot be written: {error.strerror or error}.") from error
        run.define_metric("tokens")
        for section in SECTIONS:
            run.define_metric(f"{section}/*", step_metric="tokens")

    def _entity(self) -> str | None:
        return self._wandb_init.get("entity")

    def _own(self, record: dict[str, Any]) -> str | None:
        """The id of the folder's W&B run, unless the configuration names another run, project or entity."""
        same = record.get("project") == self._project and record.get("entity") == self._entity()
        return record.get("id") if same and self._forced in (None, record.get("id")) else None

    def _write_record(self) -> None:
        """Note which W&B run this is, and what of it is logged; the client's files may be gone at the next start."""
        assert self._folder is not None
        content = {
            "id": self.experiment.id,
            "project": self._project,
            "entity": self._entity(),
            "offline": self.offline,
            "logged": self._steps,
        }
        with atomic_write(self._folder / RECORD) as file:
            file.write(json.dumps(content).encode())

    def _logged(self, run_id: str, record: dict[str, Any]) -> dict[str, int]:
        """The last steps that W&B has: the server's; offline those of the client's files, without them the record's."""
        if not self.offline:
            last = int(self.experiment.step) - 1 if self.experiment.resumed else 0
            return dict.fromkeys(KINDS, last)
        steps: dict[str, int] = {}
        for row in wandb_files.history(self._place(), run_id):
            for kind in _kinds(row):
                steps[kind] = max(steps.get(kind, 0), int(row.get("_step", 0)))
        noted = record.get("logged")
        if not steps and isinstance(noted, dict):
            return {kind: step for kind, step in noted.items() if kind in KINDS and type(step) is int}
        return steps

    def _place(self) -> Path:
        return Path(self.save_dir or ".")

    def _announce_change(self, run_id: str, record: dict[str, Any]) -> None:
        """Say what happens where the sessions before were online and this one is not, or the other way round."""
        if self.offline and record.get("offline") is False:
            last = max(self._steps.values(), default=0)
            log.warning(
                "W&B: this run was online and goes on offline: what was logged up to step %d counts as uploaded, and "
                "`wandb sync` adds the rest.", last,
            )  # fmt: skip
        if not self.offline and (files := wandb_files.unsynced(self._place(), run_id)):
            self._replaced = files
            log.warning(
                "W&B: this run was offline and goes on online: the rows that the server lacks are logged now, and the "
                "offline files are marked as synced, since `wandb sync` would log them twice (only they have the texts "
                "of that time)."
            )

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """The configuration as W&B groups by it: `optim.lr`, `model.dim`, and the options chosen (`choice.optim`)."""
        plain = params.get("cfg", params) if isinstance(params, dict) else params
        if isinstance(plain, dict):
            chosen = {group: option for group, option in choices().items() if option and "/" not in group}
            plain = {**plain, **({"choice": chosen} if chosen else {})}
        super().log_hyperparams(plain)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """A row; nothing where W&B has it already."""
        if step is None:
            self.experiment.log(dict(metrics))
            return
        if self._fill:
            self._fill = False
            self._fill_in(step, _kinds(metrics))
        self._log(metrics, step)

    def _log(self, metrics: Mapping[str, Any], step: int) -> None:
        kinds = _kinds(metrics)
        if all(step <= self._steps.get(kind, 0) for kind in kinds):
            return
        self._steps |= dict.fromkeys(kinds, step)
        self.experiment.log({**metrics, STEP: step, "tokens": step * self._tokens}, step=step)
        for name in ("val/bpb", "val/loss"):
            value = metrics.get(name, math.nan)
            if value < self._best.get(name, math.inf):
                self._best[name] = value
                self.experiment.summary[f"best/{name}"] = value

    def _fill_in(self, step: int, kinds: set[str]) -> None:
        """Log the rows of metrics.csv before this one that a kill has lost on their way to W&B."""
        assert self._folder is not None
        for row in read_metrics(self._folder / "metrics.csv"):
            metrics = {k: v for k, text in row.items() if k != "step" and (v := as_float(text)) is not None}
            if int(row["step"]) < step or (int(row["step"]) == step and not kinds & _kinds(metrics)):
                self._log(metrics, int(row["step"]))
        for path in self._replaced:
            wandb_files.mark_synced(path)

    @rank_zero_only
    def log_summary(self, content: dict[str, Any]) -> None:
        """What summary.json says; and the checkpoint, where it is wanted."""
        compression = {f"compression/{name}": value for name, value in content.get("compression", {}).items()}
        figures = {key: value for key, value in content.items() if "/" in key and value is not None}
        best = {f"best/{name}": value for name, value in self._best.items()}
        self.experiment.summary.update({key: content[key] for key in SUMMARY} | figures | best | compression)
        self._write_record()
        if self.artifacts and content["status"] in ("finished", "stopped"):
            self._log_checkpoint(content)

    def _log_checkpoint(self, content: dict[str, Any]) -> None:
        import wandb

        assert self._folder is not None
        if not (self._folder / "checkpoints" / "last.ckpt").is_file():
            return
        if not self.offline:  # the client refuses inputs when it is offline
            data = wandb.Artifact(f"data-{self.experiment.id}", "dataset", description=str(content["data"]))
            with data.new_file("data.json") as file:
                json.dump({key: self.experiment.config.get(key) for key in ("data", "tokenizer")}, file, default=str)
            self.experiment.use_artifact(data)
        self.experiment.log_artifact(checkpoint_artifact(self._folder, self.experiment.id, content))


def checkpoint_artifact(folder: Path, run_id: str, summary: dict[str, Any]) -> Any:
    """The last checkpoint of a run folder with the files it needs; equal files are one version, whoever logs them."""
    import wandb

    metadata = {key: summary[key] for key in ("step", "val/bpb", "parameters") if summary.get(key) is not None}
    artifact = wandb.Artifact(f"model-{run_id}", "model", metadata=metadata)
    artifact.add_file(str(folder / "checkpoints" / "last.ckpt"), "checkpoints/last.ckpt")
    for name in FILES:
        if (folder / name).is_file():
            artifact.add_file(str(folder / name), name)
    return artifact


def log_files(folder: Path, files: Sequence[Path], offline: bool) -> list[str]:
    """Log files made of a run (a GGUF file, say) as artifacts, in a W&B run of its own beside the run's.

    Online the run's checkpoint is their input, so that W&B shows where they come from. Offline the client refuses
    inputs, and each artifact only names its run.

    Returns:
        their names.

    Raises:
        UserError: a file or the run's W&B record is missing, or the client cannot start.
    """
    import wandb

    record = read_mapping(folder / RECORD)
    if not record:
        raise UserError(f"{folder} is not the folder of a run that was logged to W&B: it has no {RECORD}.")
    if missing := [path for path in files if not path.is_file()]:
        raise UserError(f"there is no file {missing[0]}.")
    summary = read_summary(folder)
    try:
        run = wandb.init(
            project=record.get("project"), entity=record.get("entity"), dir=str(folder), job_type="export",
            name=f"export {folder.name}", config={"run": record["id"]}, mode="offline" if offline else "online",
        )  # fmt: skip
        with run:
            if not offline and (folder / "checkpoints" / "last.ckpt").is_file():
                run.use_artifact(checkpoint_artifact(folder, record["id"], summary))
            names = []
            for path in files:
                kind = path.suffix.removeprefix(".") or "file"
                artifact = wandb.Artifact(f"{kind}-{record['id']}", kind, metadata={"run": record["id"]})
                artifact.add_file(str(path), path.name)
                run.log_artifact(artifact)
                names.append(artifact.name)
            return names
    except (wandb.Error, OSError) as error:
        raise UserError(f"W&B did not take the files: {' '.join(str(error).split())}.") from error


def _kinds(row: Mapping[str, Any]) -> set[str]:
    """Which of KINDS a row has."""
    found = {"val" for name in row if name.startswith("val/")}
    found |= {"samples" for name in row if name.startswith("samples")}
    return found | ({"train"} if not found or any(name.startswith("train/") for name in row) else set())


def _best_of(folder: Path) -> dict[str, float]:
    """The best validations of a run so far."""
    rows = read_metrics(folder / "metrics.csv")
    columns = {name: [value for _, value in curve(rows, name)] for name in ("val/bpb", "val/loss")}
    return {name: min(found) for name, found in columns.items() if found}
