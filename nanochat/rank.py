"""One rank of a run on several: what nanochat.training.launcher starts, and what a rank of torchrun becomes.

python -m nanochat.rank FOLDER    FOLDER holds the job
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
from pathlib import Path

from nanochat.environment import prepare_environment

prepare_environment()  # before anything imports torch

import lightning  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.core.utils import configure_log  # noqa: E402

from nanochat import ranks  # noqa: E402
from nanochat.config.vocabulary import build_data  # noqa: E402
from nanochat.run import fit, quieten  # noqa: E402
from nanochat.training import launcher  # noqa: E402
from nanochat.training.alike import check_alike  # noqa: E402


def work(job: launcher.Job) -> dict[str, float]:
    """Train as one rank of a job whose process group this process is in; returns the metrics, on rank 0."""
    quieten()
    lightning.seed_everything(job.plain["seed"], verbose=False)
    data = build_data(job.plain)
    data.setup("fit")
    check_alike(job.plain, data)
    return fit(job.folder, job.plain, data, job.checkpoint)


def main(place: Path) -> int:
    """A rank of our own launcher; returns its exit code."""
    launcher.end_with_parent()
    job: launcher.Job = pickle.loads((place / launcher.JOB).read_bytes())
    sys.argv = job.argv
    if job.hydra is not None:
        HydraConfig.instance().set_config(job.hydra)
        if os.environ["RANK"] == "0":
            configure_log(job.hydra.hydra.job_logging, job.hydra.hydra.verbose)
    if os.environ["RANK"] != "0":
        logging.disable(logging.WARNING)  # rank 0 says it
    try:
        launcher.enter(job.plain, launcher.store_at(place, ranks.timeout_of(job.plain)))
        metrics = work(job)
    except SystemExit:  # all ranks leave after a signal
        (place / launcher.LEFT).touch()
        raise
    except Exception as error:
        return launcher.exit_code_of(error, place)
    if ranks.rank() == 0:
        (place / launcher.RESULT).write_text(json.dumps(metrics))
    ranks.leave()
    return 0


def follow() -> int:
    """A rank of torchrun other than the first: does what that one says; returns its exit code."""
    job = launcher.follow()
    logging.disable(logging.WARNING)
    try:
        work(job)
    except Exception as error:
        return launcher.exit_code_of(error, None)
    ranks.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
