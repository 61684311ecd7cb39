"""An end for the trials of a search that others have left behind."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from nanochat import ranks
from nanochat.errors import UserError
from nanochat.files import shown
from nanochat.search import Trial
from nanochat.training.callbacks.base import validation_due, validations_done

log = logging.getLogger(__name__)


class Pruner(Callback):
    """Reports each validation of a trial to its search, and ends the run when the search gives the trial up.

    The run ends as any other does: with a checkpoint, samples and a summary, whose status is `pruned`. The validation
    of the last step is reported alone. Where the study cannot be reached the trial is trained to its end.

    Args:
        trial: of the search; on several ranks rank 0 asks for all.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.pruned = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not validation_due(trainer):
            return
        asked = self._ask(trainer) if trainer.is_global_zero else False
        if not ranks.agreed(asked) or trainer.should_stop or trainer.global_step >= trainer.max_steps >= 0:
            return
        self.pruned = trainer.should_stop = True
        log.info(
            "Pruned after step %d: its val/bpb of %.4f is behind that of other trials (hydra.sweeper.pruner=%s). To "
            "train it to its end: nanochat train --resume %s",
            trainer.global_step,
            float(trainer.callback_metrics["val/bpb"]),
            self.trial.pruning.rule,
            shown(Path(trainer.default_root_dir)),
        )

    def _ask(self, trainer: Trainer) -> bool:
        value = float(trainer.callback_metrics.get("val/bpb", math.nan))
        if not math.isfinite(value):  # what becomes of such a run is decided elsewhere
            return False
        try:
            return self.trial.report(validations_done(trainer), value)
        except UserError as error:
            log.warning("This validation was not reported to the search, and the trial goes on: %s", error)
            return False
