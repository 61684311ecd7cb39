"""Resume a run: find the checkpoint; refuse incompatible changes."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint import DamagedCheckpointError, check_whole, read_checkpoint
from nanochat.config.renamed import rename_targets
from nanochat.config.schema import DEFAULTS, PLAIN_KEYS
from nanochat.environment import rank_count
from nanochat.errors import UserError
from nanochat.files import anchored
from nanochat.model.config import GPTConfig
from nanochat.run_folder import step_checkpoints

log = logging.getLogger(__name__)

OWN_RULES = {*PLAIN_KEYS, *DEFAULTS, "hydra", "rate_scale"} - {"model"}
"""top-level keys that are not compared as a whole; all others (the model, the features) must be equal"""
MUST_BE_EQUAL = ("seed", "data.corpus", "data.seq_len", "data.seed", "data.vocab_size",
                 "trainer.accumulate_grad_batches", "loss.label_smoothing", "loss.z_loss", "weights")  # fmt: skip
"""values without which a resumed run would not be the same run; the text itself is compared by the data"""
WARN_IF_CHANGED = (
    "schedule",
    "trainer.max_steps",
    "loss.chunk",
    "trainer.precision",
    "trainer.gradient_clip_val",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "model.int8",
    "model.int8_backward",
)
"""values that may change, at the price of other results than those of an undisturbed run"""
PATHS = (
    "data.paths",
    "data.val_paths",
    "data.cache_dir",
    "tokenizer.path",
    "collider.reference",
    "collider.cache",
)
"""files and folders that a resumed run reads again"""
ABSENT = object()


def rows_changed(saved: dict[str, Any], cfg: dict[str, Any]) -> list[str]:
    """The line of `differences` for the rows of a micro-batch, which a resume may share out among other ranks."""
    sizes = lookup(saved, "data.batch_size"), lookup(cfg, "data.batch_size")
    counts = rank_count(saved), rank_count(cfg)
    if counts[0] == counts[1] or not all(isinstance(size, int) for size in sizes):
        return differences("data.batch_size", *sizes)
    rows = [size * count for size, count in zip(sizes, counts, strict=True)]
    if rows[0] == rows[1]:
        return []
    size, rest = divmod(rows[0], counts[1])
    hint = "" if rest else f" (data.batch_size={size} keeps it)"
    return [f"data.batch_size x ranks {rows[0]} -> {rows[1]}{hint}"]


def checkpoint_to_resume(folder: Path, ckpt_path: str | Path | None) -> Path | None:
    """The checkpoint to resume from, checked against its checksums, or None for a fresh start.

    Args:
        folder: the run's folder.
        ckpt_path: `last` (the newest whole one of the folder), `auto` (the same, or a fresh start where there is none),
            a file, or None.

    Raises:
        UserError: there is no such checkpoint or none that is whole, or a fresh start would overwrite a saved run.
    """
    place = folder / "checkpoints"
    if ckpt_path is None:
        if (place / "last.ckpt").is_file() or step_checkpoints(place):
            raise UserError(
                f"{folder} already holds a run with checkpoints: resume it with ckpt_path=last, or give another "
                "hydra.run.dir."
            )
        return None
    if ckpt_path in ("auto", "last"):
        found = newest_whole(place)
        if found is None and ckpt_path == "last":
            raise UserError(
                f"ckpt_path=last: there is no {place / 'last.ckpt'}; give the run's folder as hydra.run.dir, or say "
                "ckpt_path=auto to start afresh where there is none."
            )
        return found
    path = Path(ckpt_path)
    if not path.is_file():
        raise UserError(f"ckpt_path={path}: there is no such file.")
    check_whole(path)
    return path


def newest_whole(place: Path) -> Path | None:
    """`last.ckpt` of a `checkpoints` folder; where it is damaged the newest whole `step=N.ckpt`, with a warning.

    Returns:
        None where there are no checkpoints.

    Raises:
        UserError: all of them are damaged.
    """
    last = place / "last.ckpt"
    problems: dict[Path, str] = {}
    for path in [*([last] if last.is_file() else []), *step_checkpoints(place).values()]:
        if any(os.path.samefile(path, damaged) for damaged in problems):  # last.ckpt by its other name
            continue
        try:
            read_checkpoint(path)
        except DamagedCheckpointError as error:
            problems[path] = str(error)
            continue
        if problems:
            log.warning("%s Resuming from %s, the newest whole checkpoint.", " ".join(problems.values()), path)
        return path
    if problems:
        raise UserError(f"no checkpoint in {place} is whole: {' '.join(problems.values())}")
    return None


def anchor_paths(plain: dict[str, Any]) -> dict[str, Any]:
    """A copy of a run's plain configuration whose paths mean the same from every working folder.

    `collider.reference` follows links, too: `outputs/latest` is this very run from its first checkpoint on.
    """
    plain = copy.deepcopy(plain)
    for key in PATHS:
        group, _, name = key.partition(".")
        node = plain.get(group)
        value = node.get(name) if isinstance(node, dict) else None
        if not value:
            continue
        value = [anchored(path) for path in value] if isinstance(value, list) else anchored(value)
        node[name] = os.path.realpath(value) if key == "collider.reference" else value  # type: ignore[index]
    return plain


def check_resume(path: Path, plain_cfg: dict[str, Any]) -> None:
    """Compare a checkpoint with the configuration that is to resume it; neither is changed.

    Warns of what changes the results (schedule, precision, threads, compile mode, torch's version).

    Raises:
        UserError: the file is damaged, foreign or of a newer format; or the run would not be the same run (the
            message lists each key, old -> new).
    """
    checkpoint = read_checkpoint(path)
    saved, run = (checkpoint.get("hyper_parameters") or {}).get("cfg"), checkpoint.get("nanochat_run")
    if not isinstance(saved, dict) or not isinstance(run, dict) or "optimizer_states" not in checkpoint:
        raise UserError(f"ckpt_path={path} holds weights only, or is not a run of nanochat: it cannot be resumed.")
    saved, plain_cfg = (
        {**cfg, "model": _model_fields(cfg)} for cfg in (anchor_paths(rename_targets(saved)), plain_cfg)
    )
    saved.setdefault("weights", "float32")  # an older version had no other
    plain_cfg.setdefault("weights", "float32")
    whole = sorted((set(saved) | set(plain_cfg)) - OWN_RULES)
    changed = [
        line
        for key in (*MUST_BE_EQUAL, *whole)
        for line in differences(key, lookup(saved, key), lookup(plain_cfg, key))
    ]
    changed = [line for line in changed if line.split()[0] not in WARN_IF_CHANGED]
    if isinstance(saved.get("schedule"), dict):
        saved["schedule"] = {"horizon": "steps", **saved["schedule"]}  # an older version had no other
    changed += rows_changed(saved, plain_cfg)
    changed += differences("tokenizer", saved.get("tokenizer"), plain_cfg.get("tokenizer"))
    optim = differences("optim", saved.get("optim"), plain_cfg.get("optim"))
    # rates are not part of the optimizer's state; everything else says what the state means
    rates = [line for line in optim if line.split()[0].endswith(("lr", ".weight_decay"))]
    changed += [line for line in optim if line not in rates]
    if changed:
        raise UserError(
            f"{path} cannot be resumed with other settings than it was trained with: {'; '.join(changed)}. "
            "Undo these changes, or train a new run."
        )
    inexact = [line for key in WARN_IF_CHANGED for line in differences(key, lookup(saved, key), lookup(plain_cfg, key))]
    inexact += rates
    if lookup(plain_cfg, "schedule.horizon") == "time":
        key = "trainer.max_time"
        inexact += differences(key, lookup(saved, key), lookup(plain_cfg, key))
    here = {"threads": torch.get_num_threads(), "compile": bool(plain_cfg.get("compile") is True),
            "torch": str(torch.__version__)}  # fmt: skip
    inexact += [line for key, value in here.items() for line in differences(key, run.get(key), value)]
    if inexact:
        log.warning("Resuming, but not bit for bit, since these have changed: %s.", "; ".join(inexact))


def _model_fields(cfg: dict[str, Any]) -> Any:
    """The model's values, those that an older version did not have yet at what they mean there."""
    values: Any = cfg.get("model")
    try:
        return dataclasses.asdict(GPTConfig.from_dict({k: v for k, v in values.items() if not k.startswith("_")}))
    except (AttributeError, TypeError, UserError):  # compared as they stand
        return values


def lookup(cfg: dict[str, Any], key: str) -> Any:
    """The value at a dotted key, `ABSENT` where there is none."""
    value: Any = cfg
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return ABSENT
        value = value[part]
    return value


def differences(key: str, old: Any, new: Any) -> list[str]:
    """`key old -> new` for each leaf that differs; an absent one equals null, and `auto` of an option that is new."""
    old, new = (None if v is ABSENT else list(v) if isinstance(v, tuple) else v for v in (old, new))
    if isinstance(old, dict) or isinstance(new, dict):
        # a feature that is off has no node, or an empty one
        before, after = (v if isinstance(v, dict) else {} for v in (old, new))
        return [
            line
            for name in sorted({**before, **after}, key=str)
            for line in differences(f"{key}.{name}", before.get(name), after.get(name))
        ]
    return [] if old == new or (old is None and new == "auto") else [f"{key} {show(old)} -> {show(new)}"]


def show(value: Any) -> str:
    """A value as it is written on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
