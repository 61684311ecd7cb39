"""The card of a model: what it is, what it learned from, what was measured, how to use it, as Markdown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nanochat
from nanochat.errors import UserError
from nanochat.export.card import run_settings, size_label
from nanochat.run_folder import read_summary
from nanochat.zoo.manifest import Manifest, Metric

if TYPE_CHECKING:
    from nanochat.checkpoint import Run

LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
CORPORA = {
    "stdlib": {"text": "source files of Python's own standard library", "licence": "PSF-2.0"},
    "synthetic": {"text": "token numbers from a formula, no text", "licence": "none needed"},
}
"""what is known of the corpora that come with nanochat"""
SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "seq_len", "tied", "value_embeddings")
METRICS = {"val/bpb": "bits per byte of held-out text", "val/loss": "nats per token of held-out text"}
_NUMBER = r"([\d.]+(?:e[-+]?\d+)?)"
_METRIC = re.compile(
    rf"\s*([\w/. -]+?)\s*=\s*(-?){_NUMBER}\s*(?:(?:±|\+-)\s*{_NUMBER})?\s*(?:[,;:]\s*(.*))?", re.DOTALL
)


def parse_metric(text: str) -> Metric:
    """`val/bpb=1.12 ± 0.01, three seeds` -> a `Metric`; raises `UserError` for another form."""
    match = _METRIC.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        value, half = float(match[2] + match[3]), float(match[4]) if match[4] else None
    except ValueError as error:
        raise UserError(
            f"--metric {text!r} is not a figure: write NAME=VALUE or 'NAME=VALUE ± HALF, how it was measured'."
        ) from error
    low, high = (None, None) if half is None else (round(value - half, 12), round(value + half, 12))
    return Metric(match[1], value, low, high, (match[5] or "").strip())


def describe(
    run: Run,
    name: str,
    licence: str,
    *,
    summary: str | None = None,
    data: dict[str, str] | None = None,
    metrics: tuple[Metric, ...] = (),
) -> Manifest:
    """What a run says of itself, as a manifest without files.

    Args:
        run: a trained model.
        name: of the model in the zoo.
        licence: SPDX identifier of the weights.
        summary: one sentence; by default made from its shape and its result.
        data: more lines of the data card, or others than the run's.
        metrics: figures from elsewhere (a study over several seeds); one replaces the run's own of the same name.

    Raises:
        UserError: the licence is not an identifier.
    """
    if not LICENCE.fullmatch(licence):
        raise UserError(f"--licence {licence!r} is not an SPDX identifier, such as MIT or Apache-2.0.")
    found, step = read_summary(run.folder), int(run.meta.get("step", 0))
    parameters = sum(parameter.numel() for parameter in run.gpt.parameters())
    own = tuple(_own_metrics(found, step, {metric.name for metric in metrics}))
    weights = "ternary" if run.config.ternary else "float"
    config = {key: getattr(run.config, key) for key in SHAPE}
    commands = {"train it again": training} if (training := _training_command(found)) else {}
    use = f"zoo:{name}"
    commands |= {
        "continue a text": f"nanochat generate {use} --prompt 'def '",
        "talk to it": f"nanochat chat {use}",
        "serve it": f"nanochat serve {use}",
        "a copy for llama.cpp": f"nanochat zoo get {use} --out .",
    }
    seconds = "trained_seconds" if "trained_seconds" in found else "seconds"  # the second: of the last session alone
    return Manifest(
        name=name,
        licence=licence,
        summary=summary or f"A {weights} GPT of {size_label(parameters)} parameters after {step:,} steps.",
        weights=f"{name}.gguf",
        files={},
        model={"parameters": parameters, "step": step, "weights": weights, "config": config}
        | {key: found[key] for key in ("tokens", seconds, "commit", "torch") if found.get(key)},
        data=_data_card(run, found) | (data or {}),
        metrics=(*metrics, *own),
        commands=commands,
        version=nanochat.__version__,
    )


def _training_command(found: dict[str, Any]) -> str | None:
    """The command of a run, without where it was to put its folder."""
    overrides = found.get("overrides")
    if isinstance(overrides, list) and overrides:
        return shlex.join(
            ["python", "train.py", *(str(o) for o in overrides if not str(o).startswith(("hydra.", "ckpt_path=")))]
        )
    return str(found["command"]) if found.get("command") else None


def _own_metrics(found: dict[str, Any], step: int, others: set[str]) -> Iterator[Metric]:
    for name, meaning in METRICS.items():
        if name not in others and isinstance(found.get(name), float):
            yield Metric(name, found[name], how=f"{meaning}, one run, step {step:,}")
    for name, value in (found.get("compression") or {}).items():
        if name not in others and isinstance(value, float):
            yield Metric(name, value, how="bits per byte of the same text, for comparison")


def _data_card(run: Run, found: dict[str, Any]) -> dict[str, str]:
    settings = run_settings(run)
    data = settings.get("data")
    corpus = data.get("corpus") if isinstance(data, dict) else None
    card = dict(CORPORA.get(str(corpus), {"licence": "not stated"}))
    if isinstance(found.get("data"), str):
        card["contents"] = found["data"]
    return {"corpus": str(corpus or "not stated"), **card}


def render(manifest: Manifest) -> str:
    """The card as Markdown, with the header that the Hugging Face hub reads."""
    tags = ["nanochat", "gguf", "llama.cpp", str(manifest.model.get("weights", "ternary"))]
    lines = [
        "---",
        f"license: {manifest.licence.lower()}",
        "library_name: nanochat",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(tags)}]",
        "---",
        "",
        f"# {manifest.name}",
        "",
        _plain(manifest.summary),
        "",
        "## Measured",
        "",
    ]
    if manifest.metrics:
        lines += ["| figure | value | 95% interval | how |", "|---|---|---|---|"]
        for metric in manifest.metrics:
            interval = "" if metric.low is None or metric.high is None else f"{metric.low:.4g} to {metric.high:.4g}"
            lines.append(f"| {_plain(metric.name)} | {metric.value:.4g} | {interval} | {_plain(metric.how)} |")
    else:
        lines.append("Nothing: the run was not validated.")
    lines += ["", "## Network", "", "| | |", "|---|---|"]
    config = manifest.model.get("config")
    shape = config if isinstance(config, dict) else {}
    for key, value in {**{k: v for k, v in manifest.model.items() if k != "config"}, **shape}.items():
        shown = f"{value:,}" if type(value) is int else str(value)
        lines.append(f"| {_plain(key)} | {_plain(shown)} |")
    lines += ["", "## Data", "", "| | |", "|---|---|"]
    lines += [f"| {_plain(key)} | {_plain(value)} |" for key, value in manifest.data.items()]
    lines += ["", "## Use", ""]
    for purpose, command in manifest.commands.items():
        lines += [f"{_plain(purpose).capitalize()}:", "", f"    {' '.join(command.split())}", ""]
    limits = (
        "It is small and knows only what its corpus says: do not take its output for facts, nor its code for tested."
    )
    return "\n".join([*lines, "## Limits", "", limits, "", f"Licence of the weights: {manifest.licence}.", ""])


def _plain(text: str) -> str:
    """Text for a cell of a table: one line, and nothing that Markdown, HTML or a terminal would act on."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def printable(text: str) -> str:
    """A stranger's text without characters that a terminal would act on."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def read_text(path: Path) -> str:
    """A card's text; raises `UserError` when it cannot be read."""
    try:
        return printable(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not text'}.") from error
