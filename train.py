"""Train a model: `python train.py model=d20 optim=muon trainer.max_steps=1000` (`python train.py --help` shows it all).

Hydra composes conf/train.yaml and what the command line changes, nanochat.config.check looks for every problem
before anything is written, and nanochat.run.train does the rest.
"""

from __future__ import annotations

import sys

from nanochat.environment import prepare_environment

prepare_environment()  # before anything imports torch

from nanochat.launch import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
