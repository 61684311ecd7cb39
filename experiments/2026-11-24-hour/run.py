"""An hour of training by the clock, with SIGKILLs at random moments.

`python experiments/2026-11-24-hour/run.py --out outputs/hour`

The run has a time budget. After each kill it is started again as a scheduler would (`ckpt_path=auto`). At the end: did
the training time end within 1% of the budget, and are the losses of the steps that were trained twice the same, bit for
bit, both times?
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import time
from pathlib import Path


def rows(folder: Path) -> dict[int, tuple[str, str]]:
    """step -> (loss, learning rate) as written, of the rows that training has finished."""
    file = folder / "metrics.csv"
    if not file.exists():
        return {}
    with file.open(encoding="utf-8", newline="") as lines:
        return {int(r["step"]): (r["train/loss"], r["train/lr"]) for r in csv.DictReader(lines) if r.get("train/lr")}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("overrides", nargs="*", default=["experiment=tiny"])
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--minutes", type=float, default=60.0)
    options.add_argument("--kills", type=int, default=3)
    options.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    given = options.parse_intermixed_args()
    folder: Path = given.out / "run"
    given.out.mkdir(parents=True, exist_ok=True)
    draw = random.Random(given.seed)
    moments = sorted(draw.uniform(0.1, 0.9) * given.minutes * 60 for _ in range(given.kills))
    command = [
        sys.executable, "-m", "nanochat.cli", "train", "ckpt_path=auto", *given.overrides, "schedule.horizon=time",
        f"trainer.max_time={given.minutes:g}m", "callbacks.checkpoint.every_n_train_steps=50",
        f"hydra.run.dir={folder}",
    ]  # fmt: skip
    start, kills, different = time.monotonic(), [], []
    before: dict[int, tuple[str, str]] = {}
    for moment in [*moments, None]:
        with (given.out / "log.txt").open("ab") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log)
        if moment is not None:
            time.sleep(max(0.0, moment - (time.monotonic() - start)))
            child.kill()
        code = child.wait()
        now = rows(folder)
        different += [step for step in before if step in now and before[step] != now[step]]
        before = now
        if moment is not None:
            saved = [int(file.stem.split("=")[1]) for file in (folder / "checkpoints").glob("step=*.ckpt")]
            kills.append({
                "seconds": round(time.monotonic() - start), "exit": code,
                "step": max(now, default=0), "saved": max(saved, default=0),
            })  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    found = {
        "exit": code, "minutes": given.minutes, "wall_seconds": round(time.monotonic() - start), "kills": kills,
        "steps": summary["step"], "trained_twice": sum(kill["step"] - kill["saved"] for kill in kills),
        "of_them_different": different, "summary": summary,
    }  # fmt: skip
    text = json.dumps(found, indent=1)
    (given.out / "result.json").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
