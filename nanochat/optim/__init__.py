"""The optimizer stage: one optimizer a run, built from named parameter groups, and the schedules of its rates."""

from nanochat.optim.build import build
from nanochat.optim.optimizer import Optimizer
from nanochat.optim.rule import Rule
from nanochat.optim.rules import RULES
from nanochat.optim.schedule import WSD, Constant, Cosine, Linear, Schedule

__all__ = ["RULES", "WSD", "Constant", "Cosine", "Linear", "Optimizer", "Rule", "Schedule", "build"]
