"""Overrides of runs of a few steps: with every callback, and without those that take time."""

from __future__ import annotations

RUN = ["trainer.max_steps=5", "trainer.val_check_interval=2", "callbacks.checkpoint.every_n_train_steps=2"]
BARE = [*RUN, "~callbacks.sampler", "~callbacks.loss_plot", "~callbacks.progress"]
