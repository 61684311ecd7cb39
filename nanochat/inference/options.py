"""Options of the commands that write text: `generate`, `chat` and `serve`."""

from __future__ import annotations

import argparse

import torch

from nanochat.console import count_or_zero, number
from nanochat.device import find_device
from nanochat.errors import UserError
from nanochat.inference.sampling import Sampling


def pick_device(name: str) -> torch.device:
    """`auto`, or a device's name; raises `UserError` for one that this machine lacks."""
    try:
        device = find_device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used on this machine.") from error
    return device


def add_sampling(options: argparse.ArgumentParser, top_p: float = 0.95) -> None:
    """The options of `Sampling`, without a logit bias."""
    options.add_argument("--temperature", type=number, default=0.8, help="0 takes the most likely token (0.8)")
    options.add_argument("--top-k", type=count_or_zero, default=0, help="draw from the k most likely tokens (0: all)")
    options.add_argument(
        "--top-p", type=number, default=top_p, help=f"draw from the most likely tokens up to p ({top_p})"
    )
    options.add_argument(
        "--min-p", type=number, default=0.0, help="leave out tokens less likely than p times the likeliest (0)"
    )
    options.add_argument(
        "--repetition-penalty", type=number, default=1.0, help="above 1: against tokens that stand there already (1)"
    )


def sampling_of(options: argparse.Namespace) -> Sampling:
    """The `Sampling` that the options of `add_sampling` describe; raises `UserError`."""
    return Sampling(
        options.temperature, options.top_k, options.top_p, options.min_p, repetition_penalty=options.repetition_penalty
    )
