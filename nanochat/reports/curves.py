"""Curves of metrics.csv, and loss.png."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

from nanochat.files import atomic_write
from nanochat.run_folder import as_number, read_metrics

log = logging.getLogger(__name__)

POINTS = 2000  # of a curve; longer ones are averaged down


def plot_loss(folder: Path) -> None:
    """Draw loss.png of a run folder; nothing without metrics.csv."""
    rows = read_metrics(folder / "metrics.csv")
    train, val = curve(rows, "train/loss"), curve(rows, "val/loss")
    if not train and not val:
        return
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*thin(train), strict=True), color="#9aa7b5", linewidth=0.8, label="train/loss")
        axes.plot(*zip(*smooth(thin(train)), strict=True), color="#1f4e79", linewidth=1.6, label="train/loss, smoothed")
    if val:
        axes.plot(*zip(*val, strict=True), color="#d1495b", marker="o", markersize=4, label="val/loss")
    title = "" if not val else f": val/loss {val[-1][1]:.4f} nats per token at step {val[-1][0]}"
    axes.set(xlabel="optimizer steps", ylabel="nats per token", title=f"{folder.name}{title}")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        with atomic_write(folder / "loss.png") as file:
            figure.savefig(file, format="png", dpi=110)
    except OSError as error:
        log.warning("loss.png was not written: %s.", error.strerror)


def curve(rows: list[dict[str, str]], name: str) -> list[tuple[int, float]]:
    """(step, value) of the rows where a column has a finite number."""
    points = [(int(row["step"]), as_number(row.get(name))) for row in rows]
    return [(step, value) for step, value in points if value is not None]


def thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `POINTS` points: means of equally many neighbours."""
    size = -(-len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means over about a tenth of the curve around each point: a mean of the past alone lags behind a falling loss.

    Near the start they reach as far back as ahead, since the loss is steep there; at the end, where it is flat, only
    back.
    """
    half = len(points) // 20
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    result = []
    for i, (step, _) in enumerate(points):
        reach = min(half, i)
        first, end = i - reach, min(len(points), i + reach + 1)
        result.append((step, (sums[end] - sums[first]) / (end - first)))
    return result
