"""`nanochat zoo`: list, get, add, push and describe trained models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nanochat.console import Parser, count, one_of
from nanochat.errors import UserError
from nanochat.export.card import size_label
from nanochat.export.packing import EMBEDDING_TYPES, TYPES
from nanochat.files import atomic_write, shown
from nanochat.zoo import store
from nanochat.zoo.card import describe, parse_metric, printable, read_text, render
from nanochat.zoo.manifest import CARD, MANIFEST, SHA256, Manifest, decode
from nanochat.zoo.transfer import HUB, Folder, get_model, open_place, push_model, read_index, read_small

PACKAGED_LIMIT = 4_000_000
"""bytes of the weights of a model that comes with nanochat"""


def parser() -> Parser:
    """Options of `nanochat zoo`."""
    options = Parser("zoo", "Trained models; zoo:NAME is one wherever a run is taken.", as_json=False)
    verbs = options.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Verb)
    listing = verbs.add_parser("list", help="the models on this machine, or those of another place")
    listing.add_argument("source", nargs="?", help="folder or URL of a zoo, or hf:OWNER/NAME")
    getting = verbs.add_parser("get", help="fetch a model and check it")
    getting.add_argument("source", help="the model's folder (path or URL), hf:OWNER/NAME, or zoo:NAME to copy it")
    getting.add_argument("--out", type=Path, metavar="FOLDER", help="where to put it (the zoo on this machine)")
    getting.add_argument("--sha256", type=_digest, help="of its manifest, as `zoo push` prints it")
    getting.add_argument("--max-size", type=count, default=2048, metavar="MB", help="largest model to fetch (2048)")
    getting.add_argument("--force", action="store_true", help="replace a model of this name")
    adding = verbs.add_parser("add", help="put a run into the zoo on this machine")
    _add_described(adding, name_needed=True)
    adding.add_argument(
        "--type", default="auto", type=one_of(("auto", *TYPES)), help=f"auto, {', '.join(TYPES)} (auto)"
    )
    adding.add_argument(
        "--embedding-type",
        type=one_of(EMBEDDING_TYPES),
        help=f"{', '.join(EMBEDDING_TYPES)} (q8_0 beside ternary types)",
    )
    adding.add_argument("--no-mtp", action="store_true", help="leave the heads of multi-token prediction out")
    adding.add_argument("--report", type=Path, metavar="HTML", help="a page of `nanochat report` to go with it")
    adding.add_argument("--out", type=Path, metavar="FOLDER", help="another zoo's folder")
    adding.add_argument("--package", action="store_true", help="into nanochat's source, for a release: at most 4 MB")
    adding.add_argument("--force", action="store_true", help="replace a model of this name")
    pushing = verbs.add_parser("push", help="copy a model of this machine to a folder, a URL or the Hugging Face hub")
    pushing.add_argument("name", help="of the model")
    pushing.add_argument("target", help="folder or URL of a zoo, or hf:OWNER/NAME")
    pushing.add_argument("--private", action="store_true", help="a repository that nobody else sees (hf:)")
    pushing.add_argument("--force", action="store_true", help="replace a model of this name there")
    carding = verbs.add_parser("card", help="the card of a model, or the card that a run would have")
    _add_described(carding, name_needed=False)
    carding.add_argument("--out", type=Path, metavar="FILE", help="write it there")
    return options


class _Verb(Parser):
    def __init__(self, prog: str, **options) -> None:
        super().__init__(prog.removeprefix("nanochat "), None, as_json=False)
        self.description = options.get("description")


def _digest(text: str) -> str:
    if not SHA256.fullmatch(text.lower()):
        raise argparse.ArgumentTypeError(f"{text} is not a SHA-256 of 64 hexadecimal digits")
    return text.lower()


def _add_described(options: argparse.ArgumentParser, name_needed: bool) -> None:
    options.add_argument("run", help=store.RUN_HELP)
    options.add_argument("--checkpoint", default="last", metavar="STEP", help="last, or a step that was kept")
    options.add_argument("--name", required=name_needed, help="small letters, digits, '-', '.' and '_'")
    options.add_argument("--licence", default="MIT", help="SPDX identifier of the weights (MIT)")
    options.add_argument("--summary", help="one sentence for the card")
    options.add_argument(
        "--data", action="append", default=[], metavar="KEY=TEXT", help="a line of the data card, as licence=CC0-1.0"
    )
    options.add_argument(
        "--metric", action="append", default=[], metavar="TEXT", help="a figure: 'val/bpb=1.12 ± 0.01, three seeds'"
    )


def main(argv: Sequence[str]) -> int:
    """Run `nanochat zoo`; raises `UserError` for what the user can mend."""
    options = parser().parse_args(argv)
    {"list": _list, "get": _get, "add": _add, "push": _push, "card": _card}[options.verb](options)
    return 0


def _list(options: argparse.Namespace) -> None:
    rows: list[tuple[Manifest, str]] = []
    if options.source is None:
        for name in store.names():
            try:
                folder, manifest = store.find(name, hashes=False)  # whoever uses a model checks all of it
                rows.append((manifest, "packaged" if folder.parent == store.PACKAGED else shown(folder)))
            except UserError as error:
                print(f"note: {error}", file=sys.stderr)
    elif options.source.startswith(HUB):
        place = open_place(options.source)
        rows.append((decode(read_small(place, MANIFEST), place.label), place.label))
    else:
        for name, digest in read_index(options.source).items():
            place = Folder(f"{options.source.rstrip('/')}/{name}")
            rows.append((decode(read_small(place, MANIFEST), place.label), digest))
    if not rows:
        print("the zoo is empty: `nanochat zoo add RUN --name NAME` fills it")
        return
    table = Table(box=None, pad_edge=False)
    last = "where" if options.source is None else "SHA-256 of the manifest"
    for column in ("name", "parameters", "bytes", "bits per byte", "licence", last):
        table.add_column(column, no_wrap=column == "name", overflow="fold")
    for manifest, where in rows:
        parameters = manifest.model.get("parameters")
        bpb = next((str(metric) for metric in manifest.metrics if metric.name == "val/bpb"), "")
        size = size_label(parameters) if isinstance(parameters, int) else ""
        cells = (manifest.name, size, f"{manifest.size:,}", bpb, manifest.licence, where)
        table.add_row(*(escape(printable(cell)) for cell in cells))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    console.print(table)


def _get(options: argparse.Namespace) -> None:
    into = options.out or store.user_folder()
    if options.source.startswith(store.SCHEME) and options.out is None:
        raise UserError(f"{options.source} is on this machine; --out FOLDER makes a copy of it.")
    folder, manifest = get_model(
        options.source, into, sha256=options.sha256, largest=options.max_size << 20, force=options.force
    )
    use = f"{store.SCHEME}{manifest.name}" if options.out is None else shown(folder / manifest.weights)
    print(f"{folder}: {manifest.size:,} bytes, hashes hold; nanochat generate {use}")


def _described(options: argparse.Namespace, name: str, run) -> Manifest:
    data: dict[str, str] = {}
    for line in options.data:
        key, equals, text = line.partition("=")
        if not key.strip() or not equals:
            raise UserError(f"--data {line!r}: write KEY=TEXT.")
        data[key.strip()] = text.strip()
    metrics = tuple(parse_metric(text) for text in options.metric)
    return describe(run, name, options.licence, summary=options.summary, data=data, metrics=metrics)


def _add(options: argparse.Namespace) -> None:
    if options.package and options.out is not None:
        raise UserError("--package and --out exclude each other.")
    from nanochat.export.open_run import open_run  # these import torch
    from nanochat.zoo.add import add_model

    run = open_run(options.run, options.checkpoint)
    place = store.PACKAGED if options.package else options.out or store.user_folder()
    kind = options.type
    if options.package and kind == "auto":
        kind = "tq1_0"
    folder, manifest = add_model(
        run,
        place,
        _described(options, options.name, run),
        kind=kind,
        embedding_type=options.embedding_type,
        mtp=not options.no_mtp,
        report=options.report,
        limit=PACKAGED_LIMIT if options.package else None,
        force=options.force,
    )
    print(f"{folder}: {manifest.size:,} bytes, the weights {manifest.files[manifest.weights][1]:,}")
    print(f"  nanochat generate {store.SCHEME}{manifest.name}" if options.out is None else f"  card: {folder / CARD}")


def _push(options: argparse.Namespace) -> None:
    source, digest = push_model(options.name, options.target, private=options.private, force=options.force)
    print(f"nanochat zoo get {source} --sha256 {digest}")


def _card(options: argparse.Namespace) -> None:
    if options.run.startswith(store.SCHEME):
        if options.metric or options.data or options.summary:
            raise UserError("the card of a model in the zoo is as it is; name a run to write another one.")
        folder, _ = store.find(options.run.removeprefix(store.SCHEME))
        text = read_text(folder / CARD)
    else:
        from nanochat.export.open_run import open_run  # imports torch

        run = open_run(options.run, options.checkpoint)
        name = options.name or run.folder.resolve().name
        text = render(_described(options, name, run))
    if options.out is None:
        print(text, end="")
        return
    try:
        with atomic_write(options.out) as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"--out {options.out} cannot be written: {error.strerror or error}.") from error
    print(options.out)
