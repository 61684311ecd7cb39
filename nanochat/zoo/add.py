"""From a run to a model's folder in a zoo."""

from __future__ import annotations

import dataclasses
import datetime
import shutil
from pathlib import Path

from nanochat.checkpoint import Run
from nanochat.errors import UserError
from nanochat.export.gguf import default_type, export_gguf
from nanochat.export.verify import verify
from nanochat.files import replacing
from nanochat.run_folder import read_chat_template
from nanochat.zoo.card import render
from nanochat.zoo.manifest import CARD, MANIFEST, Manifest, check_name, check_replace, digest_of

REPORT = "report.html"


def add_model(
    run: Run,
    place: Path,
    described: Manifest,
    *,
    kind: str = "auto",
    embedding_type: str | None = None,
    mtp: bool = True,
    report: Path | None = None,
    limit: int | None = None,
    force: bool = False,
) -> tuple[Path, Manifest]:
    """Export a run into `place/NAME`, with its card and the hashes of its files; returns the folder and the manifest.

    Args:
        run: a trained model.
        place: the zoo's folder; it is made when it is not there.
        described: what `nanochat.zoo.card.describe` says of the run.
        kind, embedding_type, mtp: as in `export_gguf`; kind `auto` is the smallest type that fits.
        report: a page of `nanochat report` to lie beside the weights.
        limit: bytes that the weights may have.
        force: replace a model of this name.

    Raises:
        UserError: a model of this name is there, the network does not fit the type, the weights are larger than
            `limit`, the file's logits are not the run's, or the folder cannot be written. Nothing is left behind then.
    """
    name = described.name
    check_name(name)
    target = place / name
    check_replace(target, target.exists(), (target / MANIFEST).is_file(), force, ", or another --name")
    if report is not None and not report.is_file():
        raise UserError(f"--report {report}: there is no such file.")
    kind = default_type(run.config) if kind == "auto" else kind
    try:
        place.mkdir(parents=True, exist_ok=True)
        with replacing(target) as aside:
            aside.mkdir()
            weights = aside / described.weights
            written = export_gguf(run, weights, kind, embedding_type, mtp=mtp, name=name, licence=described.licence)
            if limit is not None and written.size > limit:
                raise UserError(
                    f"the weights take {written.size:,} bytes, more than {limit:,}: use --type tq1_0, a smaller "
                    "vocabulary, or no value embeddings."
                )
            manifest = _with_parity(described, run, weights, kind, written.architecture)
            run.config.to_json(aside / "model.json")
            shutil.copyfile(run.folder / "tokenizer.json", aside / "tokenizer.json")
            template = read_chat_template(run.folder)
            if template is not None:
                (aside / "chat_template.jinja").write_text(template, encoding="utf-8")
            if report is not None:
                shutil.copyfile(report, aside / REPORT)
            (aside / CARD).write_text(render(manifest), encoding="utf-8")
            files = {path.name: digest_of(path) for path in sorted(aside.iterdir())}
            manifest = dataclasses.replace(manifest, files=files)
            (aside / MANIFEST).write_bytes(manifest.encode())
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}.") from error
    return target, manifest


def _with_parity(described: Manifest, run: Run, weights: Path, kind: str, architecture: str) -> Manifest:
    """The manifest with what a comparison of the file with its run has shown; raises `UserError` when it fails."""
    checked = verify(weights, run)
    failed = [str(comparison) for comparison in checked.comparisons if not comparison.passed]
    if failed:
        raise UserError(f"the file does not compute what the run does: {failed[0].strip()}")
    model = {**described.model, "architecture": architecture, "type": kind, "weights bytes": weights.stat().st_size}
    compared = {}
    for number, check in enumerate(checked.comparisons):
        what = check.what if number else "the run and the file"  # the run's path is of no use to others
        ours, theirs = check.nll
        same = f"same top token at {check.same_top:.1%} of positions"
        compared[what] = f"on its own text: {same}, NLL {ours:.4f} and {theirs:.4f}"
    today = datetime.date.today().isoformat()
    return dataclasses.replace(described, model={**model, **compared}, created=today)
