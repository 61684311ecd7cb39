"""Where Hydra looks for its plugins; it accepts only what lies in this package."""

from nanochat.studies.optuna_sweeper import Search


class OptunaSweeper(Search):
    """`hydra/sweeper=optuna`."""
