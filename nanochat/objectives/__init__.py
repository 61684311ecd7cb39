"""What is minimised."""

from nanochat.objectives.linear_cross_entropy import IGNORED, LinearCrossEntropy, linear_cross_entropy
from nanochat.objectives.next_token import NextToken
from nanochat.objectives.step import Objective, Step

__all__ = ["IGNORED", "LinearCrossEntropy", "NextToken", "Objective", "Step", "linear_cross_entropy"]
