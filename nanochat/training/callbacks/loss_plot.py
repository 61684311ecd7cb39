"""loss.png: the curves of metrics.csv."""

from __future__ import annotations

from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from nanochat.reports.curves import plot_loss


class LossPlot(Callback):
    """Draws loss.png from metrics.csv at each validation and at the end. Place it after the metrics."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            plot_loss(Path(trainer.default_root_dir))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:  # else the last validation is at the end, or is still to come
            plot_loss(Path(trainer.default_root_dir))
